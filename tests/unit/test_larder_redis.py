"""Who is the primary, as larder-redis concludes it from what Sentinels and servers say."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("larder_redis", ROOT / "roles/redis/files/larder_redis.py")
assert spec
assert spec.loader
larder_redis = importlib.util.module_from_spec(spec)
sys.modules["larder_redis"] = larder_redis
spec.loader.exec_module(larder_redis)

Sentinel, Server = larder_redis.Sentinel, larder_redis.Server
A, B, C = "192.0.2.1", "192.0.2.2", "192.0.2.3"


def test_more_than_half_of_the_sentinels_decide():
    answers = [Sentinel(A, 1), Sentinel(B, 2), Sentinel(B, 2)]
    assert larder_redis.by_sentinels(answers, 3, majority=True) == B


def test_fewer_sentinels_do_not_decide_before_the_time_is_over():
    """The one of a host that was away during a failover answers first: its own."""
    assert larder_redis.by_sentinels([Sentinel(A, 1)], 3, majority=True) == ""
    assert larder_redis.by_sentinels([Sentinel(A, 1)], 3, majority=False) == A
    assert larder_redis.by_sentinels([Sentinel(A, 1), Sentinel(B, 2)], 5, majority=False) == B
    assert larder_redis.by_sentinels([], 3, majority=False) == ""


def test_a_server_that_others_follow_comes_before_one_that_stands_alone():
    assert larder_redis.by_servers([Server(A, A, 0, 900), Server(B, B, 1, 5)]) == B
    assert larder_redis.by_servers([Server(A, A, 0, 5), Server(B, B, 0, 900)]) == B


def test_where_the_primary_does_not_answer_its_replicas_name_it():
    assert larder_redis.by_servers([Server(A, C, 0, 5), Server(B, C, 0, 7)]) == C
    assert larder_redis.by_servers([]) == ""


def test_the_answer_to_role_is_understood():
    assert larder_redis.server(A, ["master", 70, [[B, "6379", "70"]]]) == Server(A, A, 1, 70)
    assert larder_redis.server(B, ["slave", A, 6379, "connected", 70]) == Server(B, A, 0, 70)


def test_what_sentinel_has_written_is_read(tmp_path, monkeypatch):
    path = tmp_path / "state.conf"
    path.write_text(
        "port 0\nsentinel monitor larder 192.0.2.1 6379 2\n"
        'sentinel auth-user larder "s_g1"\nsentinel sentinel-user s_g1\n'
    )
    monkeypatch.setattr(larder_redis, "SENTINEL_STATE", path)
    held = larder_redis.state()
    assert held["auth-user larder"] == held["sentinel-user"] == "s_g1"
