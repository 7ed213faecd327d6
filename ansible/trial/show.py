"""Read features of several symbols through the trial's gateway and print them as a table.

    ansible-vault view …/vault.yml | python show.py INVENTORY

The vault's text comes on standard input, so that no token is in the process table.
"""

from __future__ import annotations

import json
import ssl
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import yaml

SYMBOLS = ("GOOG.US", "EURUSD", "SP500", "NASDAQ")
FEATURES = (
    "ohlcv_features:close",
    "technical_indicators_ma:sma_20",
    "technical_indicators_momentum:rsi_14",
    "technical_indicators_momentum:macd_histogram",
    "technical_indicators_volatility:bb_width",
    "volume_indicators:mfi_14",
    "price_action:daily_return",
)
REQUESTS = 20


def read(url: str, token: str, trusted: ssl.SSLContext) -> tuple[dict[str, Any], float]:
    """Return (Feast's answer, milliseconds)."""
    request = Request(  # noqa: S310 - the trial's own gateway
        f"{url}/get-online-features",
        json.dumps({"features": FEATURES, "entities": {"symbol": SYMBOLS}}).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    started = time.perf_counter()
    with urlopen(request, timeout=10, context=trusted) as response:  # noqa: S310
        answer = json.load(response)
    return answer, (time.perf_counter() - started) * 1000


def table(answer: dict[str, Any]) -> str:
    """Lay the answer out, one line a symbol."""
    names = answer["metadata"]["feature_names"]
    columns = dict(zip(names, answer["results"], strict=True))
    symbols = columns.pop("symbol")["values"]
    newest = next(iter(columns.values()))["event_timestamps"]
    lines = [f"{'symbol':<10}{'bar of':<12}" + "".join(f"{name:>16}" for name in columns)]
    for row, symbol in enumerate(symbols):
        values = [column["values"][row] for column in columns.values()]
        if None in values:
            name = list(columns)[values.index(None)]
            sys.exit(f"larder: {symbol} has no value for {name}; `larder status` on pipeline1 says more")
        lines.append(f"{symbol:<10}{newest[row][:10]:<12}" + "".join(f"{value:>16.6f}" for value in values))
    return "\n".join(lines)


def main() -> None:
    inventory = Path(sys.argv[1])
    token = yaml.safe_load(sys.stdin)["gateway_tokens"]["reader"]
    token = token if isinstance(token, str) else token[0]
    trusted = ssl.create_default_context(cafile=str(inventory / "ca.crt"))
    address = yaml.safe_load((inventory / "addresses.yml").read_text())["all"]["hosts"]["server1"]["ansible_host"]
    url = f"https://{address}:8443"
    timed = [read(url, token, trusted) for _ in range(REQUESTS)]
    milliseconds = sorted(duration for _, duration in timed)
    print(f"\n{table(timed[-1][0])}\n")
    median = milliseconds[REQUESTS // 2]
    print(f"{len(SYMBOLS)} symbols x {len(FEATURES)} features in {median:.1f} ms (median of {REQUESTS}) from {url}")
    print(f"""
Try next, after `. .venv/bin/activate && export ANSIBLE_VAULT_PASSWORD_FILE={inventory}/.vault_password`:

  ansible-playbook -i {inventory} site.yml                           changes nothing
  ansible -i {inventory} pipeline -b -a "larder status"              views, rows, ages, latency
  ansible-playbook -i {inventory} ansible/client_token.yml -e token_path=~/reader.header
                                                               a token, and how to use it for requests of your own""")


if __name__ == "__main__":
    main()
