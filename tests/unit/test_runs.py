"""run_read as a plan: every failure, at every moment, with both runs in any order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import psycopg
import pytest

from lsn_consistency import Consistency, Session, Token, _runs
from lsn_consistency._hedges import BURST, HedgeBudget
from lsn_consistency._retries import Ended, Work
from lsn_consistency._runs import Hedging
from lsn_consistency._steps import Abandon, AwaitRace, Call, Spawn
from lsn_consistency.events import PositionUnknown, ReadHedged, ReadRetried
from lsn_consistency.exceptions import NoNodeAvailableError
from tests.properties import fake_cluster
from tests.properties.fake_cluster import Operation, Simulation
from tests.unit.test_plans import commit, open_read, ready_world, token_now

SEEDS = range(300)
PENDING = fake_cluster._PENDING

Outcome = Callable[[Any], Ended]


def answers(conn: Any) -> Ended:
    return Ended(conn.server.name)


def fails(state: str) -> Outcome:
    return lambda conn: Ended(error=psycopg.OperationalError(state), state=state)


def dies(conn: Any) -> Ended:
    conn.closed = True
    return Ended(error=psycopg.OperationalError("lost"), lost=True, clean=False)


def raises(conn: Any) -> Ended:
    return Ended(error=LookupError("none"))


FAULTS: list[Outcome] = [fails("40001"), fails("57P01"), dies, fails("25006"), fails("0A000")]
OUTCOMES: list[Outcome] = [*FAULTS, fails("55000"), fails("57014"), raises, answers]


class Runs(Operation):
    """
    Carry out the steps of ``run_read`` as a router does: its runs take their turns by chance.

    ``outcome`` gives how a call on a connection ends, after as many moments as ``moments`` says.
    """

    def __init__(
        self,
        world: Simulation,
        plan: Any,
        outcome: Outcome,
        moments: Callable[[], int] = lambda: 0,
        family: list[Runs] | None = None,
    ) -> None:
        self.outcome = outcome
        self.moments = moments
        self.left = 0
        self.family: list[Runs] = [self] if family is None else family
        self.started_by: Any = None
        self.calls: list[Any] = []
        self.cancelled = False
        self.room = True
        self.started: Any = None
        super().__init__(world, plan)

    def _do(self, step: Any, chance: Random) -> Any:
        if step is not self.started:
            self.started = step
            self.left = self.moments() if isinstance(step, Call) else 0
            self.ends = self.simulation.now + (getattr(step, "seconds", None) or 0.0)
            if isinstance(step, Call):
                self.family[0].calls.append(step.conn)
        if isinstance(step, Call):
            return self._called(step)
        if isinstance(step, Spawn):
            return self._spawned(step)
        if isinstance(step, AwaitRace):
            return self._awaited(step, chance)
        if isinstance(step, Abandon):
            for run in self.family:
                if run.started_by is step.run and not step.run.is_over:
                    run.cancel()
            return None
        return super()._do(step, chance)

    def _called(self, step: Call) -> Any:
        self.left -= 1
        if self.left >= 0 and not self.cancelled:
            self.simulation.pass_time(0.001)
            return PENDING
        step.last.close()
        ended = self.outcome(step.conn)
        if self.cancelled:
            ended = Ended(error=asyncio.CancelledError())
        usable = step.run is None or step.run.end(0.0)
        return ended if usable else ended._replace(clean=False)

    def _spawned(self, step: Spawn) -> bool:
        if step.run is not None and not self.room:
            return False
        run = Runs(self.simulation, step.plan, self.outcome, self.moments, self.family)
        run.started_by = step.run
        self.family.append(run)
        return True

    def _awaited(self, step: AwaitRace, chance: Random) -> Any:
        if step.race.is_over:
            return None
        if step.seconds is not None and self.simulation.now >= self.ends:
            return None
        self.simulation.pass_time(0.001)
        others = [each for each in self.family[1:] if not each.done]
        chance.choice(others).advance(chance)
        return PENDING

    def cancel(self) -> None:
        """Cancel as a task is: a call ends with it, another step is interrupted."""
        self.cancelled = True
        if not isinstance(self.step, Call) and not self.done:
            self.interrupt(asyncio.CancelledError())

    def finish_all(self, chance: Random) -> Runs:
        """Run to the end, and then what runs beside."""
        self.finish(chance)
        for run in self.family:
            run.finish(chance)
        return self


def start(
    world: Simulation,
    session: Session,
    outcome: Outcome,
    *,
    hedge_after: float | None = None,
    share: float = 1.0,
    level: Consistency | None = None,
    moments: Callable[[], int] = lambda: 0,
) -> Runs:
    """Begin a run_read."""
    work = Work(answers, (), hedged=hedge_after is not None)
    hedging = None if hedge_after is None else Hedging(hedge_after, HedgeBudget(share))
    plan = _runs.run_read(world.core, session, work, level, hedging)
    return Runs(world, plan, outcome, moments)


def node_of(world: Simulation, conn: Any) -> str:
    return next(name for name, each in world.endpoints.items() if conn.server in each.servers)


def on(world: Simulation, outcomes: dict[str, Outcome], otherwise: Outcome = answers) -> Outcome:
    """Give the outcome by the node of the connection."""
    return lambda conn: outcomes.get(node_of(world, conn), otherwise)(conn)


def finished(world: Simulation, runs: Runs, seed: int = 7) -> Runs:
    runs.finish_all(Random(seed))
    world.check_idle()
    return runs


def nodes(world: Simulation, runs: Runs) -> list[str]:
    return [node_of(world, conn) for conn in runs.calls]


# One run after the other


@pytest.mark.parametrize("fault", FAULTS[:3], ids=["40001", "57P01", "lost"])
def test_each_replica_is_asked_once_and_the_primary_last(fault: Outcome) -> None:
    """The node's fault: elsewhere, never on the same, then the primary, and then it is raised."""
    world = ready_world()
    session = Session()
    runs = finished(world, start(world, session, fault))
    order = nodes(world, runs)
    assert {"a", "b", "c"} == set(order[:3])
    assert ["primary"] == order[3:]
    assert isinstance(runs.error, psycopg.OperationalError)
    assert 3 == len([each for each in world.events if isinstance(each, ReadRetried)])


@pytest.mark.parametrize("state", ["25006", "0A000"])
def test_what_a_standby_refuses_goes_to_the_primary_at_once(state: str) -> None:
    """Another standby would refuse it too; the level of the read stays what it was."""
    world = ready_world()
    session = Session(token_now(world))
    before = session.token
    commit(world)
    outcome = on(world, {"primary": answers}, otherwise=fails(state))
    level = Consistency.READ_YOUR_WRITES
    runs = finished(world, start(world, session, outcome, level=level))
    assert 2 == len(runs.calls)
    assert "p" == runs.result
    assert before is session.token


def test_the_primary_gives_its_refusal_to_the_caller() -> None:
    """The role has not changed, so the statement is at fault."""
    world = ready_world()
    runs = finished(world, start(world, Session(), fails("25006")))
    assert 2 == len(runs.calls)
    assert isinstance(runs.error, psycopg.OperationalError)


@pytest.mark.parametrize(("state", "expected"), [("25006", "a"), ("55000", "a"), ("57P01", None)])
def test_a_demoted_primary_is_found_out(state: str, expected: str | None) -> None:
    """Its read runs on the new primary; what might have done something is not repeated."""
    world = ready_world()
    primary, promoted = (world.endpoints[name].servers[0] for name in ("primary", "a"))

    def demoted(conn: Any) -> Ended:
        if conn.server is not primary:
            return answers(conn)
        primary.is_primary = False
        promoted.promote(2)
        return fails(state)(conn)

    runs = finished(world, start(world, Session(), demoted, level=Consistency.STRONG))
    assert expected == runs.result
    assert (expected is None) == isinstance(runs.error, psycopg.OperationalError)


def test_a_promoted_replica_may_answer_as_the_primary() -> None:
    """It is the only node that is asked twice: in another role."""
    world = ready_world()
    primary = world.endpoints["primary"].servers[0]
    seen: list[str] = []

    def promoting(conn: Any) -> Ended:
        seen.append(node_of(world, conn))
        if len(seen) > 1:
            return answers(conn)
        primary.is_primary = False
        conn.server.promote(2)
        return fails("25006")(conn)

    runs = finished(world, start(world, Session(), promoting))
    assert 2 == len(seen)
    assert seen[0] == seen[1] == runs.result


def test_after_every_node_has_failed_the_promoted_one_answers() -> None:
    """Each node once, the former primary too, and once more the one that is the primary now."""
    world = ready_world()
    primary = world.endpoints["primary"].servers[0]
    seen: list[str] = []

    def last_promoting(conn: Any) -> Ended:
        seen.append(node_of(world, conn))
        if len(seen) > 4:
            return answers(conn)
        if conn.server is not primary:
            return fails("57P01")(conn)
        primary.is_primary = False
        world.endpoints["b"].servers[0].promote(2)
        return fails("25006")(conn)

    runs = finished(world, start(world, Session(), last_promoting))
    assert ["primary", "b"] == seen[3:]
    assert "b" == runs.result


def test_without_a_primary_the_refusal_is_the_cause() -> None:
    """Nothing may serve the read: it is told why it was not served where it ran."""
    world = ready_world()
    world.endpoints["primary"].servers[0].stop()
    for _ in range(4):
        world.probe("primary", Random(1))
    runs = finished(world, start(world, Session(), fails("25006")))
    assert isinstance(runs.error, NoNodeAvailableError)
    assert isinstance(runs.error.__cause__, psycopg.OperationalError)


def test_a_repeated_run_leaves_the_session_alone() -> None:
    """Its position would be the primary's, and a pin where there is none."""
    world = ready_world()
    session = Session(token_now(world))
    tokens: list[Token] = []

    def first_fails(conn: Any) -> Ended:
        tokens.append(session.token)
        commit(world)
        return dies(conn) if len(tokens) == 1 else answers(conn)

    runs = finished(world, start(world, session, first_fails))
    assert 2 == len(runs.calls)
    assert tokens[0] is tokens[1]
    assert not [each for each in world.events if isinstance(each, PositionUnknown)]


def test_a_failure_that_is_raised_counts_as_shown() -> None:
    """What the function saw may be in its error: the session is past all that the primary has."""
    world = ready_world()
    session = Session()
    commit(world)
    runs = finished(world, start(world, session, on(world, {}, otherwise=dies)))
    assert isinstance(runs.error, psycopg.OperationalError)
    assert token_now(world) == session.token


def test_each_repetition_is_told_with_its_cause() -> None:
    """Where it ran, the SQLSTATE if the server gave one, and what it said."""
    world = ready_world()
    session = Session()
    session.node = "a"
    failures = iter([fails("40001"), dies])
    runs = finished(world, start(world, session, lambda conn: next(failures, answers)(conn)))
    first, second, _ = nodes(world, runs)
    assert [ReadRetried(first, "40001", "40001"), ReadRetried(second, None, "lost")] == [
        each for each in world.events if isinstance(each, ReadRetried)
    ]


def test_a_run_that_wrote_is_not_repeated() -> None:
    """The write may have been committed."""
    world = ready_world()
    work = Work(answers, (), hedged=False)

    def writes(conn: Any) -> Ended:
        work.wrote = True
        return dies(conn)

    plan = _runs.run_read(world.core, Session(), work, None, None)
    runs = finished(world, Runs(world, plan, writes))
    assert 1 == len(runs.calls)
    assert isinstance(runs.error, psycopg.OperationalError)


@pytest.mark.parametrize(
    ("clean", "closed", "ours", "kept", "failures"),
    [
        (True, False, False, 1, 0),  # as it was taken
        (False, False, False, 0, 0),  # in the middle of something
        (False, True, False, 0, 1),  # its node has closed it
        (False, True, True, 0, 0),  # a loser that was cut off
    ],
)
def test_what_becomes_of_the_connection_of_a_run(
    clean: bool, closed: bool, ours: bool, kept: int, failures: int
) -> None:
    """Only a clean one is used again, and who cut it off does not blame its node."""
    world = ready_world()
    lease = open_read(world, Session()).result
    lease.conn.closed = closed
    Operation(world, _runs._drop(world.core, lease, clean=clean, ours=ours)).finish(Random(7))
    world.check_idle()
    assert kept == len(world.endpoints[lease.node].idle)
    assert failures == world.core.cluster.nodes[lease.node].failures


# Two at once


def test_a_slow_run_is_hedged_on_a_replica_that_has_not_run() -> None:
    """The second answers, is the route of the session, and the first is cancelled."""
    world = ready_world()
    session = Session()
    session.node = "a"
    slow = {"a": 1000}
    runs = start(world, session, answers, hedge_after=0.01)
    runs.moments = lambda: slow.pop("a", 0)
    finished(world, runs)
    first, second = nodes(world, runs)
    assert ("a", second) == (first, runs.result)
    assert second in ("b", "c")
    assert session.last_route is not None
    assert (second, second) == (session.node, session.last_route.name)
    assert [ReadHedged("a", second, True)] == [
        each for each in world.events if isinstance(each, ReadHedged)
    ]


def test_a_hedge_that_is_slower_is_told_as_one_that_lost() -> None:
    """The first answers before the second: it is the route of the session."""
    world = ready_world()
    session = Session()
    session.node = "a"
    moments = iter([30])
    runs = start(world, session, answers, hedge_after=0.01)
    runs.moments = lambda: next(moments, 1000)
    finished(world, runs)
    first, second = nodes(world, runs)
    assert ("a", "a", "a") == (first, runs.result, session.node)
    assert [ReadHedged("a", second, False)] == [
        each for each in world.events if isinstance(each, ReadHedged)
    ]


@pytest.mark.parametrize("missing", ["room", "connection"])
def test_a_hedge_that_does_not_come_about_costs_no_share(missing: str) -> None:
    """There was no room for it, or no connection: the next slow read may have it."""
    world = ready_world()
    session = Session()
    session.node = "a"
    budget = HedgeBudget(0.01)
    hedging = Hedging(0.01, budget)
    for name in "bc":
        world.endpoints[name].full = missing == "connection"
    work = Work(answers, (), hedged=True)
    plan = _runs.run_read(world.core, session, work, None, hedging)
    runs = Runs(world, plan, answers, lambda: 100)
    while not isinstance(runs.step, AwaitRace):
        runs.advance(Random(7))
    runs.room = missing != "room"
    finished(world, runs)
    assert ["a"] == nodes(world, runs)
    assert BURST == sum(budget.spend() for _ in range(100))


def test_a_read_that_is_interrupted_while_it_runs_pins() -> None:
    """What it has shown by then is unknown, also where it runs beside its caller."""
    world = ready_world()
    session = Session()
    runs = start(world, session, answers, hedge_after=60.0, moments=lambda: 1000)
    while not runs.calls:
        runs.advance(Random(7))
    runs.interrupt(KeyboardInterrupt())
    finished(world, runs)
    assert isinstance(runs.error, KeyboardInterrupt)
    assert session.token.pin_until is not None


@pytest.mark.parametrize("why", ["share", "replica", "room", "time"])
def test_a_hedge_needs_a_share_a_replica_room_and_time(why: str) -> None:
    """Without one of them the read waits for its one replica; never is the primary asked."""
    world = ready_world()
    session = Session()
    session.node = "a"
    if why == "replica":
        for name in "bc":
            world.endpoints[name].servers[0].stop()
            for _ in range(4):
                world.probe(name, Random(1))
    runs = start(
        world,
        session,
        answers,
        hedge_after=60.0 if why == "time" else 0.01,
        share=0.0 if why == "share" else 1.0,
        moments=lambda: 100,
    )
    runs.room = why != "room"
    finished(world, runs)
    assert ["a"] == nodes(world, runs)
    assert "a" == runs.result


def test_a_hedge_satisfies_the_same_token() -> None:
    """A replica that has not reached it is not asked."""
    world = ready_world()
    commit(world)
    server = world.endpoints["a"].servers[0]
    server.replicate(1.0, 1.0)
    world.probe_all(Random(3))
    runs = start(world, Session(token_now(world)), answers, hedge_after=0.01, moments=lambda: 100)
    finished(world, runs)
    assert ["a"] == nodes(world, runs)


def _check(world: Simulation, runs: Runs, session: Session, before: Token) -> None:
    """Hold what is true of every run_read, however it went."""
    names = nodes(world, runs)
    most = Counter(names).most_common(1)
    assert not most or most[0][1] == 1, names
    hedged = [each for each in world.events if isinstance(each, ReadHedged)]
    for each in hedged:
        assert {each.name, each.other} <= set(names)
    if runs.error is None:
        assert node_of_server(world, runs.result) in names
    held = session.token
    assert held.merge(before) == held


def node_of_server(world: Simulation, server: str) -> str:
    return next(
        name for name, each in world.endpoints.items() if server in {s.name for s in each.servers}
    )


@pytest.mark.parametrize("hedge_after", [None, 0.0, 0.005], ids=str)
def test_any_order_of_failures_answers_and_interruptions(hedge_after: float | None) -> None:
    """No connection and no count is left, no node is asked twice, at any point and in any order."""
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        chance = Random(seed)
        world = ready_world()
        session = Session(token_now(world))
        before = session.token
        plans = {name: chance.choice(OUTCOMES) for name in world.endpoints}
        runs = start(
            world,
            session,
            on(world, plans),
            hedge_after=hedge_after,
            moments=lambda chance=chance: chance.randrange(12),  # type: ignore[misc]
        )
        runs.room = chance.random() < 0.9
        interrupted = chance.randrange(80) if chance.random() < 0.4 else None
        for number in range(3000):
            if runs.done:
                break
            if number == interrupted:
                runs.interrupt(KeyboardInterrupt(), late=chance.random() < 0.5)
                continue
            runs.advance(chance)
        try:
            finished(world, runs, seed)
            _check(world, runs, session, before)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        counts["interrupted"] += isinstance(runs.error, KeyboardInterrupt)
        counts["answered"] += runs.error is None
        counts["twice at once"] += any(isinstance(each, ReadHedged) for each in world.events)
    assert counts["answered"] > len(SEEDS) / 10
    assert counts["interrupted"] > len(SEEDS) / 20
    assert (hedge_after is None) == (counts["twice at once"] == 0)
