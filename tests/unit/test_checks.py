"""Health checks are answered by a thread beside the event loop."""

import asyncio
import json
import socket
import urllib.error
import urllib.request

import pytest

from larder.serving import checks
from larder.serving.checks import Checks


@pytest.fixture
def ask():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()

    def ask(path="/ready"):
        try:
            answer = urllib.request.urlopen(f"http://127.0.0.1:{address[1]}{path}", timeout=5)
        except urllib.error.HTTPError as error:
            answer = error
        return answer.status, json.loads(answer.read())

    ask.address = address
    return ask


def test_a_busy_worker_is_ready_and_a_stuck_one_is_not(ask, monkeypatch):
    monkeypatch.setattr(checks, "BEAT_SECONDS", 0.01)

    async def main():
        answers = Checks(ask.address, None, lambda client: (200, {"asked": client}), bytes)
        beat = asyncio.create_task(answers.beat())
        try:
            await asyncio.sleep(0)
            # The event loop does nothing while this one asks.
            assert ask() == (200, {"asked": "127.0.0.1"})
            answers.beaten -= checks.STUCK_SECONDS
            assert ask() == (503, {"status": "stuck"})
            await asyncio.sleep(0.1)
            assert ask()[0] == 200
            assert ask("/health")[0] == 404
        finally:
            beat.cancel()
            answers.close()

    asyncio.run(main())


def test_a_silent_connection_does_not_block_another(ask):
    answers = Checks(ask.address, None, lambda _: (404, {"status": "draining"}), bytes)
    try:
        with socket.create_connection(ask.address):
            assert ask() == (404, {"status": "draining"})
    finally:
        answers.close()


def test_metrics_are_told_in_prometheus_format(ask):
    answers = Checks(ask.address, None, lambda _: (200, {}), lambda: b"larder_rows_total 7.0\n")
    try:
        with urllib.request.urlopen("http://{}:{}/metrics".format(*ask.address)) as answer:
            assert answer.read() == b"larder_rows_total 7.0\n"
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
    finally:
        answers.close()
