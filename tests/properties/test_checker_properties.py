"""
The checker on random histories: nothing in a correct one, and every planted violation found.

Correct histories come from a small model: one log of writes, of which every server shows a prefix.
A client knows the length of the prefix that it depends on, and is only served by a server that
shows at least that much. Operations take time and overlap, some writes fail, some are never
answered, and the primary shows a write only after its commit is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

from hypothesis import assume, given, note
from hypothesis import strategies as st

from lsn_consistency.testing import Operation, Violation, check
from lsn_consistency.testing.checker import CAUSAL, Guarantee

Outcome = Literal["ok", "failed", "unknown"]
Item = tuple[Guarantee, str, float, Hashable, Hashable]
"""A rule, the client and the time of a read, a key, and a value of it that is missing there."""

KEYS = "uvwxyz"
LENGTH = 60
BOUND_SECONDS = 8.0
GONE_SECONDS = 1000.0

seeds = st.integers(0, 2**32 - 1)


@dataclass
class Entry:
    """One transaction in the log."""

    values: dict[str, frozenset[int]]
    at: float
    complete: float


@dataclass
class Store:
    """A log, and what each server shows of it at a time."""

    random: Random
    forks: bool
    log: list[Entry] = field(default_factory=list)
    shown: list[int] = field(default_factory=lambda: [0, 0])

    def advance(self, now: float) -> None:
        """Let each replica replay some of the log, and all of what is old."""
        for number, shown in enumerate(self.shown):
            old = sum(1 for entry in self.log if entry.at < now - BOUND_SECONDS)
            far = self.random.randint(shown, len(self.log))
            self.shown[number] = max(far if self.random.random() < 0.5 else shown, old)

    def snapshot(self, server: int | None, now: float) -> list[Entry]:
        """Return what a replica shows, or for None the primary."""
        if server is None:
            return [entry for entry in self.log if entry.complete <= now]
        return self.log[: self.shown[server]]


@dataclass
class Client:
    """A client with the length of the log that it depends on."""

    name: str
    free: float = 0.0
    needs: int = 0


def correct_history(seed: int, *, forks: bool = False, length: int = LENGTH) -> list[Operation]:
    """
    Make a history in which every promise is kept.

    With ``forks`` commits take a while to complete on the primary, so the exception may be in it.
    """
    random = Random(seed)
    store = Store(random, forks)
    clients = [Client(f"c{number}") for number in range(random.randint(1, 5))]
    history, now = [], 0.0
    for number in range(length):
        now += random.choice((0.001, 0.4, 1.0))
        store.advance(now)
        ready = [client for client in clients if client.free <= now]
        if ready:
            client = random.choice(ready)
            if random.random() < 0.4:
                history.append(_write(store, client, number, now))
            else:
                history.append(_read(store, client, now))
    random.shuffle(history)
    return history


def _write(store: Store, client: Client, number: int, now: float) -> Operation:
    random = store.random
    keys = random.sample(KEYS, random.randint(1, 2))
    values = {key: frozenset({number}) for key in keys}
    began, ended = now - random.random() * 0.0009, now + random.random() * 3
    outcomes: tuple[Outcome, ...] = ("ok", "failed", "unknown")
    outcome = random.choices(outcomes, (8, 1, 1))[0]
    happens = outcome == "ok" or (outcome == "unknown" and random.random() < 0.5)
    if happens:
        # Completed at once, or shortly before it is acknowledged.
        complete = ended - 1e-6 if store.forks and ended - now > 1e-6 else now
        if outcome == "unknown" and store.forks:
            complete = GONE_SECONDS
        store.log.append(Entry(values, now, complete))
    if outcome == "ok":
        client.needs = len(store.log)
        # Sometimes the client goes on at once, and its operations overlap.
        client.free = ended if random.random() < 0.8 else now + 1e-5
    return Operation(client.name, "write", began, ended, values, outcome=outcome, role="primary")


def _read(store: Store, client: Client, now: float) -> Operation:
    random = store.random
    servers: list[int | None] = [None]
    servers += [number for number, shown in enumerate(store.shown) if shown >= client.needs]
    server = random.choice(servers)
    entries = store.snapshot(server, now)
    keys = random.sample(KEYS, random.randint(1, 4))
    values = {
        key: frozenset(v for entry in entries for v in entry.values.get(key, ())) for key in keys
    }
    began, ended = now - random.random() * 0.0009, now + random.random() * 2
    client.needs = max(client.needs, store.shown[server] if server is not None else len(store.log))
    client.free = ended
    role: Literal["primary", "replica"] = "primary" if server is None else "replica"
    bound = BOUND_SECONDS + 1 if random.random() < 0.5 else None
    return Operation(
        client.name,
        "read",
        began,
        ended,
        values,
        node=str(server),
        role=role,
        staleness_seconds=bound,
    )


@given(seeds)
def test_a_correct_history_has_no_violation_and_no_exception(seed: int) -> None:
    """Clients that are only served what they depend on give a clean report."""
    history = correct_history(seed)
    report = check(history)
    assert () == report.violations, str(report)
    assert () == report.exceptions, str(report)


@given(seeds)
def test_commits_that_take_their_time_are_at_most_exceptions(seed: int) -> None:
    """What a replica shows before the primary does is never a violation."""
    history = correct_history(seed, forks=True)
    report = check(history)
    assert () == report.violations, str(report)


def test_the_exception_occurs_in_the_model() -> None:
    """The test above would prove nothing otherwise."""
    found = sum(len(check(correct_history(n, forks=True)).exceptions) for n in range(100))
    assert found > 10


@given(seeds, st.data())
def test_the_order_of_the_recording_means_nothing(seed: int, data: st.DataObject) -> None:
    """A shuffled history is judged alike, also one with violations."""
    history = _without_some(seed)
    shuffled = data.draw(st.permutations(history))
    assert _items(check(history).violations) == _items(check(shuffled).violations)


@given(seeds)
def test_fewer_promises_never_give_more_violations(seed: int) -> None:
    """What is judged only shrinks when operations promise less."""
    history = _without_some(seed)
    random = Random(seed)
    weaker = [
        replace(op, promised=frozenset(g for g in op.promised if random.random() < 0.7))
        for op in history
    ]
    assert _items(check(weaker).violations) <= _items(check(history).violations)


@given(seeds)
def test_losing_a_value_excuses_exactly_that_value(seed: int) -> None:
    """With some values lost, the rest of the violations stays as it was."""
    history = _without_some(seed)
    lost = frozenset(Random(seed).sample(range(LENGTH), LENGTH // 2))
    expected = {item for item in _items(check(history).violations) if item[-1] not in lost}
    assert expected == _items(check(history, lost=lost).violations)


def _without_some(seed: int, *, forks: bool = False) -> list[Operation]:
    """Take random values out of random reads of a correct history."""
    history = correct_history(seed, forks=forks)
    random = Random(seed)

    def fewer(values: frozenset[Hashable]) -> frozenset[Hashable]:
        return frozenset(value for value in values if random.random() < 0.9)

    return [
        replace(op, values={key: fewer(values) for key, values in op.values.items()})
        if op.kind == "read"
        else op
        for op in history
    ]


def _items(violations: Iterable[Violation]) -> set[Item]:
    return {
        (violation.rule, violation.client, violation.read.began, key, value)
        for violation in violations
        for key, values in violation.missing.items()
        for value in values
    }


# The definitions, looked up pair by pair


@given(seeds, st.data())
def test_a_planted_violation_is_always_found(seed: int, data: st.DataObject) -> None:
    """One value taken out of one read is found by all the rules that it breaks, and there only."""
    history = correct_history(seed)
    places = [
        (number, key, value)
        for number, op in enumerate(history)
        if op.kind == "read"
        for key, values in sorted(op.values.items())
        for value in sorted(values)
    ]
    assume(places)
    number, key, value = data.draw(st.sampled_from(places))
    read = history[number]
    planted = replace(read, values={**read.values, key: read.values[key] - {value}})
    history[number] = planted
    note(f"{value} of {key} is taken out of {read}")
    owed = _owed(history, planted, key, value)
    expected = {(rule, read.client, read.began, key, value) for rule in owed}
    report = check(history)
    assert expected == _items([*report.violations, *report.exceptions])


def test_every_rule_is_broken_by_something_planted() -> None:
    """The tests here would prove nothing for a rule that the model never breaks."""
    found: Counter[str] = Counter()
    for seed in range(50):
        report = check(_without_some(seed, forks=True))
        found.update(violation.rule for violation in report.violations)
        found.update(f"exception of {violation.rule}" for violation in report.exceptions)
    exceptions = {"exception of monotonic_reads", "exception of writes_follow_reads"}
    assert {*CAUSAL, "bounded_staleness", *exceptions} == set(found)
    assert min(found.values()) > 5, found


@given(seeds)
def test_what_is_missing_is_found_if_and_only_if_it_is_owed(seed: int) -> None:
    """The checker agrees with the definitions on broken histories, exceptions and all."""
    history = _without_some(seed, forks=True)
    owed = {
        (rule, read.client, read.began, key, value): _is_exception(history, read, key, value, since)
        for read in history
        if read.kind == "read"
        for key in read.values
        for value in _written(history, key) - read.values[key]
        for rule, since in _owed(history, read, key, value).items()
    }
    report = check(history)
    assert {item for item, excused in owed.items() if not excused} == _items(report.violations)
    assert {item for item, excused in owed.items() if excused} == _items(report.exceptions)


def _written(history: list[Operation], key: str) -> frozenset[int]:
    return frozenset(value for op in history for value in op.values.get(key, ()))


def _owed(
    history: list[Operation], read: Operation, key: str, value: int
) -> dict[Guarantee, float]:
    """Return by which rules a read owes a value, and when the exception is last decided."""
    owed: dict[Guarantee, float] = {}
    for op in history:
        if op.outcome != "ok" or value not in op.values.get(key, ()):
            continue
        wrote = op.kind == "write"
        if op.client == read.client and op.ended < read.began:
            owed["read_your_writes" if wrote else "monotonic_reads"] = read.began
        rule: Guarantee = "monotonic_writes" if wrote else "writes_follow_reads"
        for write in history:
            follows = write.kind == "write" and write.client == op.client
            if follows and op.ended < write.began and _shows(read, write):
                owed[rule] = max(owed.get(rule, 0.0), read.began, write.began)
        bound = read.staleness_seconds
        if wrote and bound is not None and op.ended < read.began - bound:
            owed["bounded_staleness"] = read.began
    return owed


def _shows(read: Operation, write: Operation) -> bool:
    return any(values & read.values.get(key, set()) for key, values in write.values.items())


def _is_exception(
    history: list[Operation], read: Operation, key: str, value: int, since: float
) -> bool:
    holders = [op for op in history if value in op.values.get(key, ())]
    settled = any(
        op.outcome == "ok" and op.ended < since and op.role != "replica" for op in holders
    )
    written = any(op.kind == "write" and op.outcome != "failed" for op in holders)
    return read.role == "primary" and written and not settled
