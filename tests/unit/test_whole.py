"""
What must not be cut off is carried out to its end, whoever is cancelled meanwhile.
"""

from __future__ import annotations

import asyncio

import pytest

from lsn_consistency._waiting import whole


def test_what_needs_no_waiting_is_done_in_no_other_task() -> None:
    ran_in: list[object] = []

    async def work() -> None:
        ran_in.append(asyncio.current_task())

    async def main() -> None:
        await whole(work())
        assert [asyncio.current_task()] == ran_in
        assert 1 == len(asyncio.all_tasks())

    asyncio.run(main())


@pytest.mark.parametrize("steps", [1, 3])
def test_the_rest_goes_on_when_the_task_is_cancelled(steps: int) -> None:
    async def main() -> None:
        doors = [asyncio.get_running_loop().create_future() for _ in range(steps)]
        passed: list[str] = []
        ended = asyncio.Event()

        async def work() -> None:
            for door in doors:
                passed.append(await door)
            ended.set()

        task = asyncio.create_task(whole(work()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for door in doors:
            door.set_result("open")
        await asyncio.wait_for(ended.wait(), 5)
        assert ["open"] * steps == passed

    asyncio.run(main())


def test_a_failure_reaches_the_work_and_then_who_awaits_it() -> None:
    async def main() -> None:
        door = asyncio.get_running_loop().create_future()
        seen: list[str] = []

        async def work() -> None:
            try:
                await door
            except ValueError as error:
                seen.append(str(error))
                raise KeyError("after that") from error

        task = asyncio.create_task(whole(work()))
        await asyncio.sleep(0)
        door.set_exception(ValueError("closed"))
        with pytest.raises(KeyError, match="after that"):
            await task
        assert ["closed"] == seen

    asyncio.run(main())


def test_a_failure_before_any_wait_is_raised() -> None:
    async def work() -> None:
        raise KeyError("at once")

    with pytest.raises(KeyError, match="at once"):
        asyncio.run(whole(work()))
