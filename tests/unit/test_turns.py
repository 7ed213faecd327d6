"""Turns between clients, however many requests each of them has waiting."""

import asyncio

from larder.serving.turns import Turns


def test_a_client_with_one_request_waits_for_none_that_came_after_its_turn():
    served = []

    async def one(turns, client):
        await turns.take(client)
        await asyncio.sleep(0)
        served.append(client)
        turns.give()

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
            await turns.take(b"%d" % (number % 3))
            at_once += 1
            most = max(most, at_once)
            try:
                await asyncio.sleep(0.001)
            finally:
                at_once -= 1
                turns.give()

        tasks = [asyncio.create_task(one(number)) for number in range(30)]
        await asyncio.sleep(0)
        for task in tasks[1::3]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (most, turns.free, turns.waiting) == (2, 2, {})

    asyncio.run(main())
