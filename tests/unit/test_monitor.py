"""What a monitor does between two probes: leave, wait at the server, ask about timelines."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from lsn_consistency import Position, _replay_wait, _sql, _wire
from lsn_consistency._core import Core
from lsn_consistency._monitor import (
    FIRST_PATIENCE_SECONDS,
    GATHER_SECONDS,
    MAX_GATHER_SECONDS,
    MAX_PATIENCE_SECONDS,
    SHORTER_SECONDS,
    WAITING_POLL_SECONDS,
    Monitor,
)
from lsn_consistency._nodes import FIRST_RETRY_SECONDS as RETRY_SECONDS
from lsn_consistency._nodes import MANY_READS
from lsn_consistency._observation import Observation, Server
from lsn_consistency._replay_wait import FIRST_RETRY_SECONDS, IDLE_SECONDS, ReplayWait
from lsn_consistency._replication import FIRST_PATIENCE_SECONDS as FIRST_SILENCE_SECONDS
from lsn_consistency._replication import TimelineSource
from lsn_consistency._settings import Settings
from lsn_consistency._sql import REACHED, Identity
from lsn_consistency._steps import Fetch, NodeFailure, Reply
from lsn_consistency.lsn import Lsn, TimelineHistory

SYSTEM = 7
PRIMARY = Server(SYSTEM, "p", 5432, "1")
REPLICA = Server(SYSTEM, "a", 5432, "1")
TICK_SECONDS = 0.1


class World:
    """Hold a core whose clock stands still, and the connections that were opened."""

    def __init__(self) -> None:
        self.now = 100.0
        self.opened: list[tuple[float, bool]] = []
        self.closed = 0
        self.version = _sql.WAIT_FOR_VERSION
        self.core = Core(
            ["primary", "a"],
            Settings.of({"max_lag_seconds": 2.0}),
            clock=lambda: self.now,
            unix_clock=lambda: 1e9,
            emit=lambda event: None,
            kick=lambda name: None,
            warn=lambda text: None,
        )

    async def connect(self, *, replication: bool = False) -> Any:
        self.opened.append((self.now, replication))
        return SimpleNamespace(
            pgconn=SimpleNamespace(finish=self._finish),
            info=SimpleNamespace(server_version=self.version),
        )

    def _finish(self) -> None:
        self.closed += 1

    def seen(self, lsn: int, server: Server = REPLICA, timeline: int = 1) -> Observation:
        """Return what a server says of itself now."""
        return Observation(server, server is not PRIMARY, timeline, Lsn(lsn), self.now, self.now)

    def primary_at(self, lsn: int, timeline: int = 1) -> None:
        """Let the primary be observed, everything flushed."""
        seen = self.seen(lsn, PRIMARY, timeline)._replace(flush_lsn=Lsn(lsn))
        self.core.observed("primary", seen, sample=True)


# The connection to a server that lags


def _connected(lags: list[bool]) -> list[float]:
    """Probe once a tick; return after how many seconds connections were opened."""
    world = World()
    began = world.now
    monitor = Monitor("a", world.connect, world.core)
    seen: list[Observation] = []

    async def observe() -> Observation:
        return seen[-1]

    monitor._observe = observe  # type: ignore[method-assign]
    for number, lagging in enumerate(lags, 1):
        world.now += TICK_SECONDS
        world.primary_at(1000 + number)
        seen.append(world.seen(1 if lagging else 1000 + number))
        asyncio.run(monitor._probe())
    return [when - began for when, _ in world.opened]


def test_a_server_that_goes_on_lagging_is_left_more_and_more_rarely() -> None:
    """Not at the first observation, and with a limit: another server may be behind the name."""
    times = _connected([True] * 2000)
    expected = FIRST_PATIENCE_SECONDS
    assert len(times) > 8
    for before, after in pairwise(times):
        assert expected <= after - before <= expected + 3 * TICK_SECONDS
        expected = min(2 * expected, MAX_PATIENCE_SECONDS)
    assert MAX_PATIENCE_SECONDS == expected


def test_a_server_that_lags_for_moments_keeps_its_monitor() -> None:
    """It was caught up in between, so each time counts by itself."""
    assert 1 == len(_connected([True, True, True, False] * 50))


def test_after_it_has_caught_up_the_patience_begins_anew() -> None:
    """A server that lags again later is left as soon as the first time."""
    *before, again = _connected([True] * 20 + [False] * 20 + [True] * 10)
    assert 3 == len(before)
    since = again - 40 * TICK_SECONDS
    assert FIRST_PATIENCE_SECONDS <= since <= FIRST_PATIENCE_SECONDS + 3 * TICK_SECONDS


# The statement that is asked again and again


def test_each_connection_keeps_its_probe_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """To plan it takes longer than to answer; a new connection has nothing prepared."""
    world = World()
    world.version = 0
    asked: list[Fetch] = []
    probe = ["1", "t", None, "0/64", "0/64", "1", "1", "t", "f", None, None]
    identity = [str(SYSTEM), "a", "5432", "1", "8192", "16777216", "0.2", "1 x"]

    async def fetch(step: Fetch, timeout: float) -> Reply:
        asked.append(step)
        row = [*probe, *identity] if step.statement == _sql.IDENTIFY else probe
        return Reply(row, 1, world.now, world.now)

    monkeypatch.setattr(_wire, "fetch_async", fetch)
    monitor = Monitor("a", world.connect, world.core)

    async def scenario() -> None:
        for closes in (False, False, True, False, False):
            world.now += TICK_SECONDS
            await monitor._probe()
            if closes:
                monitor._close()

    asyncio.run(scenario())
    first, *before = [asked.pop(0).prepared for _ in range(3)]
    again, after = [step.prepared for step in asked]
    assert (None, None) == (first, again)
    assert before[0] is not None
    assert before[0] is before[1]
    assert after is not None
    assert after is not before[0]


# The time between two probes


def test_a_monitor_looks_again_as_soon_as_somebody_waits() -> None:
    """At once, or every few milliseconds for a position; a failing node is not hammered."""
    world = World()
    cluster = world.core.cluster

    async def scenario() -> dict[str, float]:
        monitor = Monitor("a", _never, world.core)
        world.core.observed("a", world.seen(1))
        monitor._seen = world.seen(1)
        found = {"idle": monitor._interval()}
        waiter = cluster.wait_for_position(Position(SYSTEM, 1, Lsn(50)), lambda: None)
        found["position"] = monitor._interval()
        monitor._replay.tend(world.seen(1))
        found["the server tells"] = monitor._interval()
        await monitor._replay.stop()
        cluster.give_up(waiter)
        waiter = cluster.wait_for_observation("a", world.now + 1, lambda: None)
        found["observation"] = monitor._interval()
        cluster.give_up(waiter)
        for _ in range(10):
            world.core.failed("a", ConnectionError("gone"))
        found["failing"] = monitor._interval()
        cluster.wait_for_observation("a", world.now + 1, lambda: None)
        found["failing, observation"] = monitor._interval()
        return found

    found = asyncio.run(scenario())
    poll = world.core.poll_seconds
    assert (poll, poll) == (found["idle"], found["the server tells"])
    assert (WAITING_POLL_SECONDS, 0.0) == (found["position"], found["observation"])
    assert 0 < found["failing, observation"] <= RETRY_SECONDS < found["failing"]


@pytest.mark.parametrize("many", [MANY_READS - 1, MANY_READS, MANY_READS + 1, 1000])
def test_many_reads_that_end_share_a_probe_and_few_do_not_wait(many: int) -> None:
    """The time between probes grows with the reads in flight, up to a limit."""
    world = World()
    cluster = world.core.cluster

    async def scenario() -> float:
        monitor = Monitor("a", _never, world.core)
        world.core.observed("a", world.seen(1))
        for _ in range(many):
            cluster.enter(cluster.nodes["a"], fallback=False)
        cluster.wait_for_observation("a", world.now + 1, lambda: None)
        return monitor._interval()

    few = many < MANY_READS
    expected = 0.0 if few else min(many * GATHER_SECONDS, MAX_GATHER_SECONDS)
    assert expected == asyncio.run(scenario())


def test_a_kick_wakes_only_for_an_earlier_probe() -> None:
    """Each read that ends kicks: a monitor that will probe no sooner goes on sleeping."""
    world = World()

    async def scenario() -> tuple[bool, bool]:
        monitor = Monitor("a", _never, world.core)
        world.core.observed("a", world.seen(1))
        monitor._probed_at = world.now
        monitor._pause_ends = world.now + world.core.poll_seconds
        monitor.kick()
        idle = monitor._awake.is_set()
        world.core.cluster.wait_for_observation("a", world.now + 1, lambda: None)
        monitor.kick()
        return idle, monitor._awake.is_set()

    assert (False, True) == asyncio.run(scenario())


@pytest.mark.parametrize("left", [SHORTER_SECONDS / 2, SHORTER_SECONDS * 2])
def test_a_pause_that_nearly_ends_is_left_as_it_is(left: float) -> None:
    """Of reads that end one after another each would have the monitor pause anew."""
    world = World()

    async def scenario() -> bool:
        monitor = Monitor("a", _never, world.core)
        world.core.observed("a", world.seen(1))
        monitor._probed_at = world.now
        monitor._pause_ends = world.now + left
        world.core.cluster.wait_for_observation("a", world.now + 1, lambda: None)
        monitor.kick()
        return monitor._awake.is_set()

    assert (left > SHORTER_SECONDS) is asyncio.run(scenario())


@pytest.mark.parametrize("version", [_sql.WAIT_FOR_VERSION - 1, _sql.WAIT_FOR_VERSION])
def test_only_a_server_that_can_wait_is_asked_to(version: int) -> None:
    """An older one would need another connection each time, to say that it cannot."""
    world = World()
    world.version = version
    world.primary_at(100)
    world.core.cluster.wait_for_position(Position(SYSTEM, 1, Lsn(50)), lambda: None)

    async def scenario() -> bool:
        monitor = Monitor("a", world.connect, world.core)

        async def observe() -> Observation:
            return world.seen(1)

        monitor._observe = observe  # type: ignore[method-assign]
        await monitor._probe()
        asked = monitor._replay._task is not None
        await monitor._replay.stop()
        return asked

    assert (version >= _sql.WAIT_FOR_VERSION) == asyncio.run(scenario())


# The wait for a position


class Waiting:
    """Drive a `ReplayWait` whose server answers as ``answers`` says, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str | None) -> None:
        self.world = World()
        self.sent: list[bytes] = []
        self.woken = 0
        self.identity = Identity(REPLICA, 8192, 1 << 24, 0.0)
        self.wait = ReplayWait(self.world.connect, self.world.core, self._wake)
        self._answers = list(answers)
        monkeypatch.setattr(_wire, "fetch_async", self._fetch)
        monkeypatch.setattr(_wire, "run_async", self._identify)

    def _wake(self) -> None:
        self.woken += 1

    async def _identify(self, plan: Any, timeout: float) -> Any:
        plan.close()
        return self.identity, None

    async def _fetch(self, step: Fetch, timeout: float) -> Reply:
        self.sent.append(step.statement)
        if step.statement == _sql.READ_COMMITTED:
            return Reply((), 1, 0.0, 0.0)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer is None:
            raise NodeFailure(ConnectionError("gone"))
        return Reply((answer,), 1, 0.0, 0.0)

    def read_waits_for(self, lsn: int, timeline: int = 1) -> None:
        """Let a read wait for a position."""
        self.world.core.cluster.wait_for_position(
            Position(SYSTEM, timeline, Lsn(lsn)), lambda: None
        )

    def tend(self, seen: Observation | None = None) -> int:
        """Tend once, let a wait that begins end, and return how many were asked for."""
        before = self.waits

        async def once() -> None:
            self.wait.tend(self.world.seen(1) if seen is None else seen)
            if self.wait._task is not None:
                await self.wait._task

        asyncio.run(once())
        return self.waits - before

    @property
    def waits(self) -> int:
        return sum(statement.startswith(b"wait for lsn") for statement in self.sent)


def test_a_wait_begins_when_a_read_waits_and_wakes_the_monitor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody waits: nothing is sent. The monitor looks when the wait has ended."""
    waiting = Waiting(monkeypatch, REACHED)
    assert 0 == waiting.tend()
    waiting.read_waits_for(50)
    assert 1 == waiting.tend()
    assert waiting.sent[0] == _sql.READ_COMMITTED
    assert waiting.sent[1] == _sql.wait_for(Lsn(50), _replay_wait.WAIT_SECONDS)
    assert 1 == waiting.woken


@pytest.mark.parametrize(
    "changes",
    [{"in_recovery": False}, {"pooled": True}, {"timeline": None}],
    ids=["a primary", "a pooler", "timeline unknown"],
)
def test_what_is_no_standby_of_its_own_is_not_waited_on(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The statement would wait at another server, or for a position of another log."""
    waiting = Waiting(monkeypatch, REACHED)
    waiting.read_waits_for(50)
    waiting.read_waits_for(50, timeline=0)
    assert 0 == waiting.tend(waiting.world.seen(1)._replace(**changes))


def test_a_yes_that_the_probe_does_not_share_is_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It knows no timeline: the monitor polls for a time that doubles, and tries again."""
    waiting = Waiting(monkeypatch, REACHED)
    waiting.read_waits_for(50)
    assert [1, 0] == [waiting.tend() for _ in range(2)]
    waiting.world.now += FIRST_RETRY_SECONDS / 2
    assert 0 == waiting.tend()
    waiting.world.now += FIRST_RETRY_SECONDS / 2
    assert 1 == waiting.tend()


def test_a_wait_that_ran_out_of_time_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The read may wait for longer than one statement does."""
    waiting = Waiting(monkeypatch, "timeout")
    waiting.read_waits_for(50)
    assert [1, 1, 1] == [waiting.tend() for _ in range(3)]
    assert 1 == len(waiting.world.opened)


def test_a_wait_that_fails_leaves_its_connection_and_is_tried_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The monitor polls meanwhile: it is woken, and knows that nothing waits."""
    waiting = Waiting(monkeypatch, None)
    waiting.read_waits_for(50)
    patience = FIRST_RETRY_SECONDS
    for number in range(1, 6):
        assert 1 == waiting.tend()
        assert (number, number, number) == (
            waiting.woken,
            waiting.world.closed,
            len(waiting.world.opened),
        )
        assert not waiting.wait.covers(waiting.world.seen(1))
        waiting.world.now += patience * 0.9
        assert 0 == waiting.tend()
        waiting.world.now += patience * 0.1 + 1e-6
        patience *= 2


@pytest.mark.parametrize("other", ["server", "restarted", "pooled", "old"])
def test_a_connection_of_another_server_is_not_waited_on(
    monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Its answer would be about another replay; an old server would refuse the statement."""
    waiting = Waiting(monkeypatch, REACHED)
    waiting.read_waits_for(50)
    if other == "old":
        waiting.world.version -= 1
    waiting.identity = {
        "server": replace(waiting.identity, server=REPLICA._replace(address="b")),
        "restarted": replace(waiting.identity, server=REPLICA._replace(started="2")),
        "pooled": replace(waiting.identity, pooled=True),
        "old": waiting.identity,
    }[other]
    assert 0 == waiting.tend()
    assert ([], 1) == (waiting.sent, waiting.world.closed)


def test_a_connection_that_no_read_needs_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept for a while, so that one read after the other does not connect."""
    waiting = Waiting(monkeypatch, "timeout")
    waiting.read_waits_for(50)
    waiting.tend()
    waiting.world.now += IDLE_SECONDS
    waiting.tend()
    assert (1, 0) == (len(waiting.world.opened), waiting.world.closed)
    waiting.world.now += IDLE_SECONDS + 1
    waiting.tend()
    assert (2, 1) == (len(waiting.world.opened), waiting.world.closed)


def test_a_wait_covers_the_positions_at_or_beyond_its_own() -> None:
    """A read that waits for less, or on another timeline, needs the probes."""
    world = World()
    cluster = world.core.cluster
    cluster.wait_for_position(Position(SYSTEM, 1, Lsn(50)), lambda: None)

    async def scenario() -> list[bool]:
        wait = ReplayWait(_never, world.core, lambda: None)
        before = wait.covers(world.seen(1))
        wait.tend(world.seen(1))
        found = [before, wait.covers(world.seen(1)), wait.covers(None)]
        found.append(wait.covers(world.seen(1, timeline=2)))
        cluster.wait_for_position(Position(SYSTEM, 1, Lsn(60)), lambda: None)
        found.append(wait.covers(world.seen(1)))
        cluster.wait_for_position(Position(SYSTEM, 1, Lsn(40)), lambda: None)
        found.append(wait.covers(world.seen(1)))
        await wait.stop()
        return [*found, wait.covers(world.seen(1))]

    assert [False, True, False, False, True, False, False] == asyncio.run(scenario())


async def _never(**_: Any) -> Any:
    await asyncio.Event().wait()


# Questions about timelines


class Asking:
    """Drive a `TimelineSource` whose server gives an answer, or refuses without one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = World()
        self.asked = 0
        self.answer: tuple[int, TimelineHistory | None] | None = None
        self.source = TimelineSource("a", self.world.connect, self.world.core)
        monkeypatch.setattr(_wire, "run_async", self._run)

    def _run(self, plan: Any, timeout: float) -> Coroutine[Any, Any, Any]:
        async def answered() -> Any:
            plan.close()
            self.asked += 1
            if self.answer is None:
                raise NodeFailure(ConnectionError("must be superuser"))
            return self.answer

        return answered()

    def ask(self, **changes: Any) -> int:
        """Ask about a standby whose timeline is not certain; return how often it was asked."""
        before = self.asked
        uncertain = self.world.seen(1)._replace(timeline_is_certain=False)
        asyncio.run(self.source.ask(uncertain._replace(**changes)))
        return self.asked - before


def test_a_standby_tells_its_timeline_and_is_not_believed_in_its_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its copy may be of another leader of the same number; its timeline is its own."""
    asking = Asking(monkeypatch)
    core = asking.world.core
    asking.answer = 2, TimelineHistory(2, {1: Lsn(10)}, True)
    assert 1 == asking.ask()
    newest = core.cluster.nodes["a"].newest
    assert newest is not None
    assert (2, True) == (newest.timeline, newest.timeline_is_certain)
    assert not core.cluster.timelines.history(SYSTEM, 2).complete
    assert [True] == [replication for _, replication in asking.world.opened]


def test_a_timeline_that_is_known_to_be_higher_is_not_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The walsender can still be on the timeline that the standby was on before."""
    asking = Asking(monkeypatch)
    asking.answer = 1, None
    assert 1 == asking.ask(timeline=2)
    newest = asking.world.core.cluster.nodes["a"].newest
    assert newest is not None
    assert 2 == newest.timeline


def test_who_is_refused_asks_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most roles are refused every time; a question about another server is a new one."""
    asking = Asking(monkeypatch)
    patience = FIRST_SILENCE_SECONDS
    for number in range(1, 6):
        assert 1 == asking.ask()
        assert (number, number) == (len(asking.world.opened), asking.world.closed)
        asking.world.now += patience * 0.9
        assert 0 == asking.ask()
        asking.world.now += patience * 0.1 + 1e-6
        patience *= 2
    assert [1, 0] == [asking.ask() for _ in range(2)]
    assert [1, 0] == [asking.ask(server=REPLICA._replace(started="2")) for _ in range(2)]


def test_behind_a_pooler_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next connection may be of another server."""
    assert 0 == Asking(monkeypatch).ask(pooled=True)


def test_when_nothing_is_to_be_asked_the_connection_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A walsender is not held for nothing."""
    asking = Asking(monkeypatch)
    asking.answer = 1, None
    assert [1, 1] == [asking.ask() for _ in range(2)]
    assert (1, 0) == (len(asking.world.opened), asking.world.closed)
    assert 0 == asking.ask(timeline_is_certain=True)
    assert 1 == asking.world.closed
