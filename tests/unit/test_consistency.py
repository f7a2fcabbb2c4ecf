"""The consistency levels, and the blocks and decorators that set them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest

from lsn_consistency.consistency import Consistency, consistency, effective
from lsn_consistency.exceptions import ConfigurationError

STRONG = Consistency.STRONG
CAUSAL = Consistency.CAUSAL
EVENTUAL = Consistency.EVENTUAL
LEVELS = [
    STRONG,
    CAUSAL,
    Consistency.READ_YOUR_WRITES,
    Consistency.bounded(3),
    EVENTUAL,
    Consistency.sticky(2.5),
]


def level() -> Consistency:
    """Return the level in force for a router whose own is CAUSAL."""
    return effective(None, CAUSAL)


@pytest.mark.parametrize(
    ("chosen", "uses_token", "lag_limit", "text"),
    [
        (STRONG, False, math.inf, "strong"),
        (CAUSAL, True, 2.0, "causal"),
        (Consistency.READ_YOUR_WRITES, True, 2.0, "read_your_writes"),
        (Consistency.bounded(3), False, 3.0, "bounded(3)"),
        (EVENTUAL, False, math.inf, "eventual"),
        (Consistency.sticky(2.5), False, math.inf, "sticky(2.5)"),
    ],
)
def test_what_each_level_asks_of_a_replica(
    chosen: Consistency, uses_token: bool, lag_limit: float, text: str
) -> None:
    """Each level says whether the token counts, and how far a replica may lag."""
    assert chosen.uses_token == uses_token
    assert chosen.lag_limit(2.0) == lag_limit
    assert str(chosen) == text


def test_levels_are_values() -> None:
    """Levels of the same meaning are equal and hash alike; all others differ."""
    assert Consistency.bounded(3) == Consistency.bounded(3.0)
    assert len({*LEVELS, Consistency.bounded(3.0), Consistency("causal")}) == len(LEVELS)
    assert Consistency.bounded(2.5) != Consistency.sticky(2.5)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, True, "1", None])
@pytest.mark.parametrize("make", [Consistency.bounded, Consistency.sticky])
def test_only_positive_seconds_are_taken(make: Any, seconds: Any) -> None:
    """A bound or a window that is no positive, finite number is refused."""
    with pytest.raises(ConfigurationError, match="positive number of seconds"):
        make(seconds)


def test_the_call_goes_before_the_block_and_the_block_before_the_router() -> None:
    """The level of the call wins, else that of the innermost block, else the router's."""
    assert effective(None, CAUSAL) == CAUSAL
    assert effective(STRONG, CAUSAL) == STRONG
    with consistency(EVENTUAL):
        assert effective(None, CAUSAL) == EVENTUAL
        assert effective(STRONG, CAUSAL) == STRONG


def test_blocks_nest() -> None:
    """Each block holds until its end, after which the one around it holds again."""
    with consistency(STRONG) as entered:
        assert entered == STRONG
        with consistency(EVENTUAL):
            assert level() == EVENTUAL
        assert level() == STRONG
    assert level() == CAUSAL


def test_an_exception_ends_the_block() -> None:
    """A block that fails sets nothing for what follows."""
    with pytest.raises(KeyError), consistency(STRONG):
        raise KeyError
    assert level() == CAUSAL


def test_one_object_can_be_entered_again() -> None:
    """The same object may be used many times, also inside itself."""
    strong = consistency(STRONG)
    with strong:
        with consistency(EVENTUAL):
            with strong:
                assert level() == STRONG
            assert level() == EVENTUAL
        assert level() == STRONG
    assert level() == CAUSAL


def test_one_object_can_be_shared_by_overlapping_tasks() -> None:
    """Tasks that enter the same object and leave it in any order disturb nobody."""
    strong = consistency(STRONG)

    async def scenario() -> list[Consistency]:
        first_in, second_in, first_out = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def first() -> Consistency:
            with strong:
                first_in.set()
                await second_in.wait()
            first_out.set()
            return level()

        async def second() -> Consistency:
            await first_in.wait()
            with strong:
                second_in.set()
                await first_out.wait()
                return level()

        return list(await asyncio.gather(first(), second()))

    assert asyncio.run(scenario()) == [CAUSAL, STRONG]


def test_one_object_can_be_shared_by_threads() -> None:
    """Threads that are in the same object's block at once see their own level."""
    strong = consistency(STRONG)
    together = threading.Barrier(2)

    def work(inner: Consistency) -> list[Consistency]:
        with strong:
            together.wait(timeout=10)
            with consistency(inner):
                together.wait(timeout=10)
                seen = [level()]
            together.wait(timeout=10)
            seen.append(level())
        return [*seen, level()]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, [EVENTUAL, CAUSAL]))
    assert results == [[EVENTUAL, STRONG, CAUSAL], [CAUSAL, STRONG, CAUSAL]]


def test_tasks_started_inside_a_block_are_covered() -> None:
    """A child task inherits the block, also when it outlives it; the parent does not."""

    async def scenario() -> tuple[Consistency, Consistency]:
        ended = asyncio.Event()

        async def child() -> Consistency:
            await ended.wait()
            return level()

        with consistency(STRONG):
            task = asyncio.create_task(child())
        ended.set()
        return await task, level()

    assert asyncio.run(scenario()) == (STRONG, CAUSAL)


def test_a_block_may_end_in_another_context_than_it_began_in() -> None:
    """The two halves of a generator that a thread pool runs are no error."""
    strong = consistency(STRONG)
    copy_context().run(strong.__enter__)
    copy_context().run(strong.__exit__, None, None, None)
    assert level() == CAUSAL


def test_blocks_that_end_out_of_order_leave_nothing_behind() -> None:
    """An outer block that ends first takes the inner one with it."""
    with consistency(EVENTUAL):
        first, second = consistency(STRONG), consistency(Consistency.bounded(1))
        first.__enter__()
        second.__enter__()
        first.__exit__()
        assert level() == EVENTUAL
        second.__exit__()
        assert level() == EVENTUAL


def test_a_function_is_decorated() -> None:
    """Every call of the function runs at the level, and nothing else of it changes."""

    @consistency(STRONG)
    def balance(account: int, *, currency: str = "EUR") -> tuple[int, str, Consistency]:
        """Say how much there is."""
        return account, currency, level()

    assert balance(1, currency="USD") == (1, "USD", STRONG)
    assert balance(2) == (2, "EUR", STRONG)
    assert (balance.__name__, balance.__doc__) == ("balance", "Say how much there is.")
    assert level() == CAUSAL


def test_a_failing_function_leaves_its_level() -> None:
    """The level ends with the call, also when the call raises."""

    @consistency(STRONG)
    def fail() -> None:
        raise KeyError(level())

    with pytest.raises(KeyError) as caught:
        fail()
    assert caught.value.args == (STRONG,)
    assert level() == CAUSAL


def test_a_coroutine_function_is_decorated() -> None:
    """The level holds across the awaits of a coroutine function, which stays one."""

    @consistency(STRONG)
    async def balance() -> list[Consistency]:
        before = level()
        await asyncio.sleep(0)
        return [before, level()]

    async def scenario() -> tuple[list[Consistency], Consistency]:
        return await balance(), level()

    assert inspect.iscoroutinefunction(balance)
    assert asyncio.run(scenario()) == ([STRONG, STRONG], CAUSAL)


def test_concurrent_calls_of_decorated_coroutines_do_not_mix() -> None:
    """Each of many overlapping calls keeps its own level."""
    functions = []
    for each in LEVELS:

        @consistency(each)
        async def work() -> Consistency:
            for _ in range(5):
                await asyncio.sleep(0)
            return level()

        functions.append(work)

    async def scenario() -> list[Consistency]:
        return await asyncio.gather(*(work() for work in functions * 20))

    assert asyncio.run(scenario()) == LEVELS * 20


def test_decorators_nest() -> None:
    """The innermost of block and decorator holds."""

    @consistency(EVENTUAL)
    def inner() -> Consistency:
        return level()

    @consistency(STRONG)
    def outer() -> tuple[Consistency, Consistency]:
        return inner(), level()

    with consistency(Consistency.bounded(1)):
        assert outer() == (EVENTUAL, STRONG)


def test_a_partial_of_a_coroutine_function_is_one() -> None:
    """The level holds while a partial's coroutine runs, not only while it is made."""

    async def balance(account: int) -> Consistency:
        await asyncio.sleep(0)
        return level()

    decorated = consistency(STRONG)(functools.partial(balance, 1))
    assert asyncio.run(decorated()) == STRONG


def test_generators_are_refused() -> None:
    """A generator's body would run at its caller's level, so it cannot be decorated."""

    def rows() -> Iterator[int]:
        yield 1

    async def rows_later() -> AsyncIterator[int]:
        yield 1

    for function in (rows, rows_later):
        with pytest.raises(ConfigurationError, match="with consistency"):
            consistency(STRONG)(function)


@pytest.mark.parametrize("given", ["strong", None, 2.0, Consistency, Consistency.bounded])
def test_only_levels_are_taken(given: Any) -> None:
    """A name, a number or a constructor that was not called is no level."""
    with pytest.raises(ConfigurationError, match="takes a Consistency"):
        consistency(given)
