"""What an instance of several workers, or of one, says of its metrics."""

import os
import subprocess
import sys

import pytest

COUNT = """
import sys
from larder.serving import metrics
metrics.ROWS.inc(int(sys.argv[1]))
metrics.aged("prices", [None, 10.0, 30.0])
print(metrics.exposition().decode())
"""


@pytest.mark.parametrize(("several", "rows"), [(True, "12.0"), (False, "7.0")])
def test_whichever_worker_is_asked_tells_of_all_of_them(tmp_path, several, rows):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
    if several:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path)
    for count in ("5", "7"):
        said = subprocess.run([sys.executable, "-c", COUNT, count], env=environment, check=True, capture_output=True)
    lines = said.stdout.decode().splitlines()
    assert f"larder_rows_total {rows}" in lines
    assert f'larder_served_age_seconds_sum{{view="prices"}} {40.0 if several else 20.0}' in lines
