"""bench/wrk.py: every answer is judged, so that no figure stands beside a wrong one."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import wrk


def answer(symbols: list[str], values: list[float | None]) -> bytes:
    results = [{"values": symbols, "statuses": ["PRESENT"]}, {"values": values, "statuses": ["PRESENT"]}]
    return json.dumps({"results": results, "metadata": {"feature_names": ["symbol", "view__close"]}}).encode()


def test_an_answer_that_is_not_what_the_store_has_is_refused() -> None:
    answers = wrk.Answers({("A",): {"view__close": [1.5]}, ("B",): {"view__close": [None]}})
    answers.check(answer(["A"], [1.5]))
    answers.check(answer(["B"], [None]))
    for symbols, values in ((["A"], [1.25]), (["A"], [None]), (["B"], [1.5]), (["C"], [1.5])):
        with pytest.raises(wrk.Different, match="not what Redis has"):
            answers.check(answer(symbols, values))


def test_an_answer_that_is_not_what_another_server_said_is_refused() -> None:
    answers = wrk.Answers()
    answers.check(answer(["A"], [1.5]))
    answers.check(answer(["B"], [2.5]))
    with pytest.raises(wrk.Different, match="not what was answered before"):
        answers.check(answer(["A"], [2.5]))


def test_all_that_the_script_wrote_is_read(tmp_path: Path) -> None:
    bodies = [b"one\ntwo", b"", b"three"]
    (tmp_path / "answers").write_bytes(b"".join(b"200 %d\n%b" % (len(body), body) for body in bodies))
    assert [*wrk.kept(tmp_path / "answers")] == [(200, body) for body in bodies]


def test_a_token_is_in_the_request_and_a_fresh_connection_ends_with_it() -> None:
    head, _, body = wrk.http_request("https://host:8443", ["A"], ["view:close"], "secret", fresh=True).partition(
        b"\r\n\r\n"
    )
    assert head.split(b"\r\n")[1:] == [
        b"Host: host:8443",
        b"Content-Type: application/json",
        b"Authorization: Bearer secret",
        b"Connection: close",
        b"Content-Length: %d" % len(body),
    ]
    assert json.loads(body)["entities"] == {"symbol": ["A"]}
