"""Every alert comes when what it is about is wrong, does not come on a healthy day, and has its runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rules
import yaml

ROOT = Path(__file__).parents[2]
PROMTOOL = shutil.which("promtool") or str(ROOT / ".larder/promtool/usr/bin/promtool")
FILES = rules.render()
ALERTS = rules.alerts(FILES)
NAMES = list(dict.fromkeys(alert["alert"] for alert in ALERTS))
MINUTES = 90
HOST = 'host="a", instance="a:1"'


class Case(NamedTuple):
    """A series when all is well, and when it is not, as promtool writes values at each minute; others are as usual."""

    series: str
    well: str
    wrong: str


def constant(value: float) -> str:
    return f"{value}x{MINUTES}"


def state(fact: str, wrong: int = 2) -> Case:
    return Case(f'larder_status_state{{fact="{fact}", of="v", {HOST}}}', constant(0), constant(wrong))


def up(job: str, well: str = constant(1), wrong: str = constant(0)) -> Case:
    return Case(f'up{{job="{job}", host="a", instance="a:2"}}', well, wrong)


def gauge(name: str, well: float, wrong: float, labels: str = "") -> Case:
    return Case(f"{name}{{{', '.join(filter(None, [labels, HOST]))}}}", constant(well), constant(wrong))


def counter(name: str, labels: str = "", pace: float = 1, well: float = 0) -> Case:
    return Case(f"{name}{{{', '.join(filter(None, [labels, HOST]))}}}", f"0+{well}x{MINUTES}", f"0+{pace}x{MINUTES}")


def same(series: str, values: str) -> Case:
    return Case(f"{series.rstrip('}')}{', ' if '{' in series else '{'}{HOST}}}", values, values)


GB = 2**30
# What is always there, beside the case's own series.
USUAL = [
    same('up{job="node_exporter"}', constant(1)),
    same('node_filesystem_size_bytes{mountpoint="/", fstype="ext4"}', constant(100 * GB)),
    same('node_filesystem_avail_bytes{mountpoint="/", fstype="ext4"}', constant(60 * GB)),
    same('node_filesystem_readonly{mountpoint="/", fstype="ext4"}', constant(0)),
    same('node_filesystem_files{mountpoint="/", fstype="ext4"}', constant(1000)),
    same("node_memory_MemTotal_bytes", constant(GB)),
    same("pg_settings_max_connections", constant(100)),
    same('patroni_replica{scope="m"}', constant(1)),
    same('haproxy_backend_agg_server_status{proxy="feature_servers", state="UP"}', constant(1)),
    same("redis_memory_max_bytes", constant(GB)),
    same('larder_request_seconds_count{endpoint="read"}', f"0+600x{MINUTES}"),
    same('haproxy_backend_http_responses_total{proxy="feature_servers", code="2xx"}', f"0+600x{MINUTES}"),
    same("larder_status_timestamp_seconds", f"0+60x{MINUTES}"),
    same("larder_pipeline_last_success_timestamp_seconds", constant(0)),
    same('redis_instance_info{role="master", job="redis_exporter"}', constant(1)),
]
ROOTFS = 'mountpoint="/", fstype="ext4"'
CASES: dict[str, Case] = {
    "HostDown": Case('up{job="node_exporter", host="b", instance="b:1"}', constant(1), constant(0)),
    "TargetDown": up("etcd_metrics"),
    "UnitFailed": gauge("node_systemd_unit_state", 0, 1, 'state="failed", name="larder-drill.service"'),
    "ServiceCrashed": counter("node_systemd_service_restart_total", 'name="redis-server.service"'),
    "DiskFull": gauge("node_filesystem_avail_bytes", 60 * GB, 5 * GB, ROOTFS),
    "DiskFilling": Case(
        f"node_filesystem_avail_bytes{{{ROOTFS}, {HOST}}}", constant(60 * GB), f"{60 * GB}-{GB // 2}x{MINUTES}"
    ),
    "DiskFilesFull": gauge("node_filesystem_files_free", 500, 5, ROOTFS),
    "MemoryFull": gauge("node_memory_MemAvailable_bytes", GB // 2, GB // 100),
    "ProcessKilledForMemory": counter("node_vmstat_oom_kill"),
    "ClockOff": gauge("node_timex_sync_status", 1, 0),
    "ClocksDiffer": Case(f"node_time_seconds{{{HOST}}}", f"0+60x{MINUTES}", f"100+60x{MINUTES}"),
    "CertificateEnds": gauge(
        "larder_certificate_not_after_timestamp_seconds", 200 * 86400, 20 * 86400, 'service="redis"'
    ),
    "MetricsUnreadable": gauge("node_textfile_scrape_error", 0, 1),
    "AnsibleLongAgo": gauge("larder_ansible_last_run_timestamp_seconds", 0, -40 * 86400),
    "PostgresDown": gauge("pg_up", 1, 0),
    "PostgresBehind": gauge("pg_replication_lag_seconds", 1, 100),
    "PostgresConnectionsFew": gauge("pg_stat_activity_count", 20, 95, 'datname="feast"'),
    "PostgresArchiveFails": counter("pg_stat_archiver_failed_count"),
    "PatroniNoLeader": gauge("patroni_primary", 1, 0, 'scope="m"'),
    "PatroniNoSyncStandby": gauge("patroni_sync_standby", 1, 0, 'scope="m"'),
    "PatroniPaused": gauge("patroni_is_paused", 0, 1, 'scope="m"'),
    "PatroniStandbyNotStreaming": gauge("patroni_postgres_streaming", 1, 0, 'scope="m"'),
    "EtcdNoLeader": gauge("etcd_server_has_leader", 1, 0),
    "EtcdLeaderChanges": counter("etcd_server_leader_changes_seen_total"),
    "RedisDown": gauge("redis_up", 1, 0, 'job="redis_exporter"'),
    "RedisMemoryFull": gauge("redis_memory_used_bytes", GB // 2, GB * 9 // 10),
    "RedisEvicts": counter("redis_evicted_keys_total"),
    "RedisWritesFail": gauge("redis_aof_last_write_status", 1, 0),
    "RedisReplicaLinkDown": gauge("redis_master_link_up", 1, 0),
    "RedisPrimaries": Case(
        'redis_instance_info{role="master", job="redis_exporter", host="b", instance="b:1"}', "_", constant(1)
    ),
    "SentinelDown": gauge("redis_up", 1, 0, 'job="sentinel"'),
    "SentinelNoQuorum": gauge("redis_sentinel_master_ckquorum_status", 1, 0),
    "ReadErrors": counter(
        "haproxy_backend_http_responses_total", 'proxy="feature_servers", code="5xx"', pace=60, well=0.1
    ),
    "ReadsSlow": counter("larder_request_seconds_bucket", 'endpoint="read", le="0.1"', pace=300, well=599),
    "ReadProbeFails": gauge("probe_success", 1, 0, 'job="read"'),
    "InstanceDown": gauge("haproxy_server_status", 1, 0, 'state="UP", proxy="feature_servers", server="a:6566"'),
    "NoInstance": gauge("haproxy_backend_active_servers", 2, 0, 'proxy="feature_servers"'),
    "PipelineFailed": state("last_run_age_seconds"),
    "PipelineLate": gauge("larder_pipeline_last_success_timestamp_seconds", 0, -30 * 3600),
    "StatusOld": Case(f"larder_status_timestamp_seconds{{{HOST}}}", f"0+60x{MINUTES}", constant(0)),
    "FeaturesStale": state("feature_age_seconds"),
    "FeaturesLate": state("feature_age_seconds", 1),
    "FewSymbols": state("newest_day_symbols_ratio", 1),
    "NotMaterialized": state("materialization_age_seconds"),
    "OnlineIncomplete": gauge("larder_status_online_complete_ratio", 1, 0.99, 'of="v"'),
    "OnlineUnreadable": state("online_read_seconds"),
    "FilesRefused": gauge("larder_status_refused_files", 0, 2),
    "SymbolsWait": state("pending_symbols"),
    "RegistryLost": state("registry_lost_objects"),
    "QualityFails": state("quality_findings"),
    "BarsQuarantined": gauge("larder_status_quarantined_bars", 0, 2),
    "ServedValuesWrong": gauge("larder_verified_wrong_values", 0, 1),
    "NotVerified": state("verified_wrong_values", 1),
    "TrainingServingSkew": state("skewed_served_values"),
    "SkewNotCompared": state("skewed_served_values", 1),
    "NotChecked": state("quality_check_age_seconds", 1),
    "FeaturesDrift": gauge("larder_status_drifted_features_ratio", 0, 0.1),
    "LineageLost": gauge("larder_pipeline_lineage_lost", 0, 3),
    "StandbyGone": state("standby_behind_bytes"),
    "BackupUnproven": state("backup_proven_age_seconds"),
    "AlertsNotDelivered": counter("alertmanager_notifications_failed_total", 'integration="webhook"'),
    "AlertmanagerUnreachable": gauge("prometheus_notifications_alertmanagers_discovered", 1, 0),
    "RulesFail": counter("prometheus_rule_evaluation_failures_total", 'rule_group="hosts"'),
    "ConfigurationRefused": gauge("prometheus_config_last_reload_successful", 1, 0),
}
# An alert that cannot come alone: what is wrong is wrong for these, too.
WITH = {
    "HostDown": ["TargetDown"],
}


def write(directory: Path, tests: Sequence[dict[str, Any]]) -> Path:
    """Write the rules and tests of promtool for them into a directory."""
    for name, text in FILES.items():
        (directory / name).write_text(text)
    path = directory / "tests.yml"
    path.write_text(yaml.safe_dump({"rule_files": [*FILES], "evaluation_interval": "5m", "tests": [*tests]}))
    return path


def firing(wrong: str, at: Sequence[str] = (f"{MINUTES}m",)) -> dict[str, Any]:
    """Return a test: which alerts fire while one series is wrong, or none."""
    values = {case.series: case.well for case in [*USUAL, *CASES.values()]}
    if wrong:
        values[CASES[wrong].series] = CASES[wrong].wrong
    expected = [wrong, *WITH.get(wrong, ())] if wrong else []
    return {
        "name": wrong or "a healthy day",
        "interval": "1m",
        "input_series": [{"series": series, "values": given} for series, given in values.items() if given != "_"],
        "promql_expr_test": [
            {
                "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": time,
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in expected],
            }
            for time in at
        ],
    }


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)


def test_every_alert_has_its_runbook() -> None:
    sections = re.findall(r"(?m)^## (\w+)$", (ROOT / "docs/alerts.md").read_text())
    assert sorted(sections) == sorted(NAMES)


def test_every_alert_has_a_summary_and_a_severity() -> None:
    for alert in ALERTS:
        assert alert["annotations"]["summary"].endswith("."), alert["alert"]
        assert alert["labels"]["severity"] in ("critical", "warning"), alert["alert"]


def test_every_alert_is_tried() -> None:
    assert sorted(CASES) == sorted(NAMES)


def test_prometheus_accepts_the_rules(tmp_path: Path) -> None:
    write(tmp_path, [])
    checked = promtool("check", "rules", "--lint-fatal", *sorted(tmp_path.glob("[!t]*.yml")))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_nothing_fires_on_a_healthy_day(tmp_path: Path) -> None:
    found = promtool("test", "rules", write(tmp_path, [firing("", ("10m", "1h", f"{MINUTES}m"))]))
    assert found.returncode == 0, found.stdout + found.stderr


def test_each_fault_fires_its_alert_and_no_other(tmp_path: Path) -> None:
    found = promtool("test", "rules", write(tmp_path, [firing(name) for name in NAMES]))
    assert found.returncode == 0, found.stdout + found.stderr
