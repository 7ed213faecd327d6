"""Turns between clients, however many requests each of them has waiting."""

import asyncio

from larder.serving import turns as module
from larder.serving.turns import MOST_REST, Pieces, Turns


def test_a_client_with_one_request_waits_for_none_that_came_after_its_turn():
    served = []

    async def one(turns, client):
        await turns.take(client)
        await asyncio.sleep(0)
        served.append(client)
        turns.give(client)

    async def main():
        turns = Turns(1)
        many = [asyncio.create_task(one(turns, b"many")) for _ in range(40)]
        await asyncio.sleep(0)
        await asyncio.gather(*many, one(turns, b"few"), one(turns, b"other"))
        assert (turns.free, turns.waiting) == (1, {})

    asyncio.run(main())
    assert len(served) == 42
    assert served.index(b"few") <= 3
    assert served.index(b"other") <= 5


def test_no_more_have_a_turn_than_may_and_one_who_gives_up_takes_none():
    async def main():
        turns, at_once, most = Turns(2), 0, 0

        async def one(number):
            nonlocal at_once, most
            client = b"%d" % (number % 3)
            await turns.take(client)
            at_once += 1
            most = max(most, at_once)
            try:
                await asyncio.sleep(0.001)
            finally:
                at_once -= 1
                turns.give(client)

        tasks = [asyncio.create_task(one(number)) for number in range(30)]
        await asyncio.sleep(0)
        for task in tasks[1::3]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (most, turns.free, turns.waiting) == (2, 2, {})

    asyncio.run(main())


def test_a_client_has_no_more_turns_than_each_may_have_and_the_others_are_left_for_others():
    async def main():
        turns, now, most = Turns(4, 2), {b"many": 0, b"other": 0}, {b"many": 0, b"other": 0}

        async def one(client):
            await turns.take(client)
            now[client] += 1
            most[client] = max(most[client], now[client])
            await asyncio.sleep(0.001)
            now[client] -= 1
            turns.give(client)

        many = [asyncio.create_task(one(b"many")) for _ in range(10)]
        await asyncio.sleep(0)
        assert turns.free == 2
        assert not await turns.take(b"third"), "there is no wait for a client that has none"
        turns.give(b"third")
        await asyncio.gather(*many, *(one(b"other") for _ in range(10)))
        assert most == {b"many": 2, b"other": 2}
        assert (turns.free, turns.taken, turns.waiting) == (4, {}, {})

    asyncio.run(main())


def test_between_pieces_small_reads_have_the_more_time_the_more_pieces_wait(monkeypatch):
    async def main():
        requests = Turns(1)
        pieces = Pieces(requests)
        assert pieces.rest(0.002) == 0, "nobody reads anything small"
        pieces.small()
        assert pieces.rest(0.002) == 0.002
        async with pieces.piece(b"many"):
            tasks = [asyncio.create_task(work(pieces, b"many")) for _ in range(20)]
            await asyncio.sleep(0)
            assert pieces.rest(0.002) == 0.002 * MOST_REST
        await asyncio.gather(*tasks)
        await requests.take(b"many")
        waiting = asyncio.create_task(requests.take(b"many"))
        await asyncio.sleep(0)
        assert pieces.rest(0.002) == 0.004, "larger requests that wait for their first piece count, too"
        waiting.cancel()
        monkeypatch.setattr(module, "RECENT_SECONDS", -1)
        assert pieces.rest(0.002) == 0, "the small reads are over"

    async def work(pieces, client):
        async with pieces.piece(client):
            pass

    asyncio.run(main())


def test_one_piece_at_a_time_and_the_event_loop_goes_round_between_two():
    async def main():
        pieces, rounds, begun = Pieces(), 0, []
        ended = asyncio.Event()

        async def work(client):
            for _ in range(5):
                async with pieces.piece(client):
                    begun.append((rounds, client))

        async def other():
            nonlocal rounds
            while not ended.is_set():
                rounds += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        await asyncio.gather(*(work(client) for client in (b"a", b"a", b"a", b"b")))
        ended.set()
        await beside
        return begun

    begun = asyncio.run(main())
    assert len({round_ for round_, _ in begun}) == len(begun) == 20
    assert [client for _, client in begun].index(b"b") <= 3
    assert sum(client == b"b" for _, client in begun[:11]) >= 4, "in turn with the other client's"
