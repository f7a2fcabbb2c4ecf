"""The session: forward only, shared by threads and tasks, current in its block only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context

import pytest

from lsn_consistency.lsn import Position
from lsn_consistency.session import DEFAULT_HEADER_NAME, Session, current_session
from lsn_consistency.tokens import Token, TokenCodec


def at(lsn: int, *, system: int = 1) -> Token:
    return Token([Position.of(system, 1, lsn)])


def test_a_new_session_knows_nothing() -> None:
    """A session starts with the empty token and without any mark of use."""
    session = Session()
    assert session.token == Token()
    assert (session.node, session.last_route, session.codec) == (None, None, None)
    assert (session.accessed, session.wrote) == (False, False)
    assert session.header_name == DEFAULT_HEADER_NAME == "X-Consistency-Token"


def test_a_session_keeps_what_it_is_given() -> None:
    """Token, codec and header name come from the constructor."""
    codec = TokenCodec("key")
    session = Session(at(5), codec=codec, header_name="X-Pos")
    assert (session.token, session.codec, session.header_name) == (at(5), codec, "X-Pos")


def test_a_session_only_advances() -> None:
    """Positions behind what the session holds change nothing; further ones are merged."""
    session = Session(at(5))
    session.advance(at(4))
    assert session.token == at(5)
    session.advance(at(6))
    session.advance(at(1, system=2))
    assert session.token == at(6).merge(at(1, system=2))


def test_an_advance_by_nothing_keeps_the_very_token() -> None:
    """Whoever compares by identity sees whether the session has advanced."""
    session = Session(at(5))
    token = session.token
    session.advance(at(5))
    session.advance(Token())
    assert session.token is token


def test_pins_only_grow() -> None:
    """The later pin holds, whichever came first."""
    session = Session()
    session.pin(20.0)
    session.pin(10.0)
    assert session.token == Token(pin_until=20.0)
    session.pin(30.0)
    assert session.token.pin_until == 30.0


def test_on_advance_gets_each_new_token() -> None:
    """The hook is called with the merged token, once for each advance and not without one."""
    session = Session(at(1, system=2))
    seen: list[Token] = []
    session.on_advance = seen.append
    session.advance(at(5))
    session.advance(at(5))
    session.advance(at(4))
    session.pin(9.0)
    merged = at(1, system=2).merge(at(5))
    assert seen == [merged, merged.merge(Token(pin_until=9.0))]


def test_on_advance_may_use_the_session() -> None:
    """The hook runs outside the lock: it may read and advance the session."""
    session = Session()

    def again(token: Token) -> None:
        session.on_advance = None
        session.advance(at(1, system=2))

    session.on_advance = again
    session.advance(at(5))
    assert session.token == at(5).merge(at(1, system=2))


def test_threads_lose_no_advance() -> None:
    """Threads that advance one session at the same time leave the merge of all they did."""
    session = Session()
    together = threading.Barrier(8)

    def advance(system: int) -> None:
        together.wait(timeout=10)
        for lsn in range(1, 2001):
            session.advance(at(lsn, system=system))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(advance, range(1, 9)))
    expected = Token(Position.of(system, 1, 2000) for system in range(1, 9))
    assert session.token == expected


# A position that no server has any more


def pos(lsn: int, *, system: int = 1, timeline: int = 1) -> Position:
    return Position.of(system, timeline, lsn)


def test_a_lost_position_is_replaced() -> None:
    """The one exception to forward only: also by a lesser position; the rest of the token stays."""
    session = Session(at(50).merge(at(7, system=2)).merge(Token(pin_until=9.0)))
    session.reissue(pos(50), pos(40))
    assert session.token == Token([pos(40), pos(7, system=2)], 9.0)


def test_a_session_that_moved_on_advances() -> None:
    """What another thread has put in meanwhile is never taken away, and what is new is added."""
    for held, expected in (
        (pos(60), pos(60)),
        (pos(30), pos(40)),
        (pos(5, timeline=2), pos(5, timeline=2)),
        (None, pos(40)),
    ):
        session = Session(Token([] if held is None else [held]))
        session.reissue(pos(50), pos(40))
        assert session.token == Token([expected])


def test_a_replacement_of_another_system_takes_only_the_lost_one() -> None:
    """A primary that belongs to another system now: both are said, and nothing else is dropped."""
    session = Session(at(50).merge(at(7, system=2)))
    session.reissue(pos(50), pos(9, system=2))
    assert session.token == at(9, system=2)


def test_a_replacement_is_told_once_and_outside_the_lock() -> None:
    """Whoever sends tokens hears of it like of an advance; a replacement by itself is none."""
    session = Session(at(50))
    heard: list[tuple[Token, Token]] = []
    session.on_advance = lambda token: heard.append((token, session.token))
    session.reissue(pos(50), pos(40))
    session.reissue(pos(50), pos(40))
    assert heard == [(at(40), at(40))]


def test_a_full_token_keeps_its_other_systems() -> None:
    """Eight systems, one of them replaced, are eight systems."""
    eight = Token(Position.of(system, 1, 50) for system in range(1, 9))
    session = Session(eight)
    session.reissue(pos(50, system=8), pos(40, system=8))
    assert set(session.token.positions) == set(eight.positions)
    assert session.token.get(8) == pos(40, system=8)


def test_no_advance_is_lost_beside_a_replacement() -> None:
    """Threads that advance while another one replaces: the furthest valid position is held."""
    for _ in range(200):
        session = Session(at(50))
        together = threading.Barrier(3)

        def advance(system: int, session: Session, together: threading.Barrier) -> None:
            together.wait(timeout=10)
            session.advance(at(60, system=system))

        def replace(session: Session, together: threading.Barrier) -> None:
            together.wait(timeout=10)
            session.reissue(pos(50), pos(40))

        with ThreadPoolExecutor(3) as pool:
            done = [pool.submit(advance, system, session, together) for system in (1, 2)]
            done.append(pool.submit(replace, session, together))
            for each in done:
                each.result(timeout=10)
        assert session.token == at(60).merge(at(60, system=2))


def test_a_replacement_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """An advance that comes in the middle of it waits, and is not overwritten."""
    session = Session(at(50))
    inside, began = threading.Event(), threading.Event()
    without = Token.without

    def slow(token: Token, system_id: int) -> Token:
        inside.set()
        assert began.wait(timeout=10)
        return without(token, system_id)

    monkeypatch.setattr(Token, "without", slow)

    def advance() -> None:
        assert inside.wait(timeout=10)
        began.set()
        session.advance(at(60))

    with ThreadPoolExecutor(1) as pool:
        advanced = pool.submit(advance)
        session.reissue(pos(50), pos(40))
        advanced.result(timeout=10)
    assert session.token == at(60)


def test_a_block_makes_the_session_current() -> None:
    """Inside the block, and nowhere else, the session is the current one; blocks nest."""
    outer, inner = Session(), Session()
    with outer as entered:
        assert entered is outer
        assert current_session() is outer
        with inner:
            assert current_session() is inner
            with outer:
                assert current_session() is outer
            assert current_session() is inner
        assert current_session() is outer
    assert in_new_context() is not outer


def in_new_context() -> Session:
    return copy_context().run(current_session)


def test_an_exception_ends_the_block() -> None:
    """A block that fails leaves what was current before, and the exception alone."""
    with Session() as outer:
        with pytest.raises(KeyError), Session():
            raise KeyError
        assert current_session() is outer


def test_a_context_without_a_session_opens_one_and_keeps_it() -> None:
    """The first call opens the session that later calls of the same context get."""

    def twice() -> tuple[Session, Session]:
        return current_session(), current_session()

    first, second = copy_context().run(twice)
    assert first is second
    assert in_new_context() is not first


def test_threads_and_tasks_share_the_session() -> None:
    """What a thread or a child task advances is seen by the code that opened the session."""

    async def child() -> None:
        current_session().advance(at(1, system=2))

    async def scenario() -> Token:
        with Session() as session:
            await asyncio.to_thread(lambda: current_session().advance(at(1, system=1)))
            await asyncio.create_task(child())
            await asyncio.gather(child(), child())
            return session.token

    assert asyncio.run(scenario()) == at(1, system=1).merge(at(1, system=2))


def test_tasks_have_sessions_of_their_own() -> None:
    """Blocks of concurrent tasks do not see each other."""

    async def work(number: int) -> bool:
        with Session() as session:
            await asyncio.sleep(0)
            session.advance(at(number))
            await asyncio.sleep(0)
            return current_session() is session and session.token == at(number)

    async def scenario() -> list[bool]:
        return await asyncio.gather(*(work(number) for number in range(1, 50)))

    assert asyncio.run(scenario()) == [True] * 49


def test_one_session_may_be_the_block_of_overlapping_tasks() -> None:
    """Tasks that enter the same session and leave it in any order disturb nobody."""
    shared = Session()

    async def scenario() -> tuple[bool, bool]:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def child() -> bool:
            with shared:
                entered.set()
                await leave.wait()
                return current_session() is shared

        with Session() as outer:
            with shared:
                task = asyncio.create_task(child())
                await entered.wait()
            leave.set()
            return await task, current_session() is outer

    assert asyncio.run(scenario()) == (True, True)


def test_a_block_may_end_in_another_context_than_it_began_in() -> None:
    """The two halves of a generator that a thread pool runs are no error."""

    @contextmanager
    def unit_of_work() -> Iterator[Session]:
        with Session() as session:
            yield session

    with Session() as outer:
        block = unit_of_work()
        session = copy_context().run(block.__enter__)
        copy_context().run(block.__exit__, None, None, None)
        assert current_session() is outer
        assert session is not outer


def test_blocks_that_end_out_of_order_leave_nothing_behind() -> None:
    """An outer block that ends first takes the inner one with it."""
    with Session() as outer:
        first, second = Session(), Session()
        first.__enter__()
        second.__enter__()
        first.__exit__()
        assert current_session() is outer
        second.__exit__()
        assert current_session() is outer


def test_repr_shows_the_token() -> None:
    """A session in a log line says what it asks for."""
    assert repr(Session(at(5))) == f"<Session {at(5)!r}>"
