"""
A history in the form in which the checker compares it: the values of each key as bits.

Most reads show what the read before showed and a little more. With integers, what is missing is
one operation for each key, and a set of values that was seen before is looked up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from operator import attrgetter
from typing import TypeAlias

from lsn_consistency.testing._operations import Guarantee, Kind, Operation

__all__ = ["History", "Knowledge", "Masks", "Required", "add", "each_once", "follow"]

Masks: TypeAlias = dict[Hashable, int]
"""Sets of values by key, one bit for each value."""


class History:
    """
    Hold a history, and what it says about each value.

    Raises `ValueError` for one that cannot be.
    """

    def __init__(self, operations: Iterable[Operation], lost: Set[Hashable]) -> None:
        self.operations = list(operations)
        self.reads = [op for op in self.operations if op.kind == "read" and op.outcome == "ok"]
        self._lost = lost
        self._lost_masks: Masks = defaultdict(int)
        self._bits: dict[Hashable, dict[Hashable, int]] = defaultdict(dict)
        self._known: dict[Hashable, dict[frozenset[Hashable], int]] = defaultdict(dict)
        self._writers: dict[tuple[Hashable, int], Operation] = {}
        for operation in self.operations:
            if operation.ended < operation.began:
                raise ValueError(f"ended before it began: {operation}")
            if operation.kind == "write":
                self._register(operation)
        writes = (op for op in self.operations if op.kind == "write" and op.outcome == "ok")
        elsewhere = (read for read in self.reads if read.role != "replica")
        self._acknowledged = self._growths(writes)
        self._shown_elsewhere = self._growths(elsewhere)

    def _register(self, write: Operation) -> None:
        """Remember who wrote each value."""
        for key, values in write.values.items():
            for bit in _bits_of(self.mask(key, values)):
                if self._writers.setdefault((key, bit), write) is not write:
                    twice = ", ".join(map(str, self.values(key, 1 << bit)))
                    raise ValueError(f"{twice} of {key} was written twice, also by {write}")

    def _growths(self, operations: Iterable[Operation]) -> dict[Hashable, _Growth]:
        """Return for each key which values some operations had confirmed by when."""
        events: dict[Hashable, list[tuple[float, int]]] = defaultdict(list)
        for operation in operations:
            for key, values in operation.values.items():
                events[key].append((operation.ended, self.mask(key, values)))
        return {key: _Growth(found) for key, found in events.items()}

    def mask(self, key: Hashable, values: frozenset[Hashable]) -> int:
        """Return the values of a key as bits."""
        mask = self._known[key].get(values)
        if mask is None:
            bits = self._bits[key]
            mask = 0
            for value in values:
                bit = 1 << bits.setdefault(value, len(bits))
                mask |= bit
                if value in self._lost:
                    self._lost_masks[key] |= bit
            self._known[key][values] = mask
        return mask

    def values(self, key: Hashable, mask: int) -> frozenset[Hashable]:
        """Return the values of a key that some bits stand for."""
        values = list(self._bits[key])
        return frozenset(values[bit] for bit in _bits_of(mask))

    def missing(self, read: Operation, expected: Mapping[Hashable, int]) -> Masks:
        """Return what a read should have shown and did not."""
        missing: Masks = {}
        for key, values in read.values.items():
            wanted = expected.get(key)
            if wanted and (lacks := wanted & ~self.mask(key, values)):
                missing[key] = lacks & ~self._lost_masks[key]
        return {key: mask for key, mask in missing.items() if mask}

    def acknowledged(self, key: Hashable, before: float) -> int:
        """Return the values of a key whose writes had been acknowledged before a time."""
        growth = self._acknowledged.get(key)
        return growth.before(before) if growth else 0

    def incomplete(self, key: Hashable, mask: int, time: float) -> int:
        """
        Return those of some values that at a time may have been visible on replicas only.

        Nobody had seen them elsewhere, and their writes had not been acknowledged.
        """
        elsewhere = self._shown_elsewhere.get(key)
        settled = self.acknowledged(key, time) | (elsewhere.before(time) if elsewhere else 0)
        found = 0
        for bit in _bits_of(mask & ~settled):
            write = self._writers.get((key, bit))
            if write is not None and write.outcome != "failed":
                found |= 1 << bit
        return found

    def writers(self, key: Hashable, mask: int) -> list[Operation]:
        """Return the writes of some values of a key, each once."""
        found = (self._writers.get((key, bit)) for bit in _bits_of(mask))
        return each_once(write for write in found if write is not None)

    def sessions(self, rule: Guarantee) -> list[list[Operation]]:
        """Return the operations of each client that carry a rule, without failed reads."""
        sessions: dict[str, list[Operation]] = defaultdict(list)
        for op in self.operations:
            if rule in op.promised and (op.kind == "write" or op.outcome == "ok"):
                sessions[op.client].append(op)
        return list(sessions.values())


class _Growth:
    """
    Tell which values of a growing set there were before a time.
    """

    def __init__(self, events: Iterable[tuple[float, int]]) -> None:
        self._times: list[float] = []
        self._masks = [0]
        for time, mask in sorted(events):
            if mask & ~self._masks[-1]:
                self._times.append(time)
                self._masks.append(self._masks[-1] | mask)

    def before(self, time: float) -> int:
        return self._masks[bisect_left(self._times, time)]


class Knowledge:
    """
    Hold what one client has written or seen so far, and by which operation first.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._sources: dict[tuple[Hashable, int], Operation] = {}
        self.masks: Masks = {}

    def learn(self, operation: Operation) -> None:
        """Add the values of an operation."""
        for key, values in operation.values.items():
            known = self.masks.get(key, 0)
            new = self._history.mask(key, values) & ~known
            if new:
                self.masks[key] = known | new
                self._sources.update(((key, bit), operation) for bit in _bits_of(new))

    def sources(self, masks: Masks) -> list[Operation]:
        """Return the operations by which some values became known, each once."""
        return each_once(
            self._sources[key, bit] for key, mask in masks.items() for bit in _bits_of(mask)
        )


def follow(
    history: History, rule: Guarantee, learned: Kind, visited: Kind
) -> Iterator[tuple[Operation, Knowledge]]:
    """
    Yield each operation of one kind with what its client knew when it began.

    What it knew are the values of its operations of the other given kind that had ended by then
    with the outcome "ok".
    """
    for session in history.sessions(rule):
        knowledge = Knowledge(history)
        ending = [op for op in session if op.kind == learned and op.outcome == "ok"]
        ending.sort(key=attrgetter("ended"))
        position = 0
        for operation in sorted(session, key=attrgetter("began")):
            if operation.kind != visited:
                continue
            while position < len(ending) and ending[position].ended < operation.began:
                knowledge.learn(ending[position])
                position += 1
            yield operation, knowledge


class Required:
    """
    Tell what a read must show because of what it shows in one key.

    ``before`` is what the client of each write, by its identity, knew when it began. A key grows,
    so what it requires is computed from what it required when it was smaller.
    """

    def __init__(self, history: History, before: Mapping[int, Masks]) -> None:
        self._history = history
        self._before = before
        self._known: dict[tuple[Hashable, int], Masks] = {}
        self._largest: dict[Hashable, tuple[int, Masks]] = {}

    def by(self, key: Hashable, shown: int) -> Masks:
        """Return what the writers of these values knew before, all together."""
        known = self._known.get((key, shown))
        if known is None:
            known = self._known[key, shown] = self._compute(key, shown)
        return known

    def _compute(self, key: Hashable, shown: int) -> Masks:
        part, masks = self._largest.get(key, (0, {}))
        if part & ~shown:
            # Something of it is missing here: rare, so it is not worth a search for a better one.
            part, masks = 0, {}
        masks = dict(masks)
        for write in self._history.writers(key, shown & ~part):
            add(masks, self._before.get(id(write), {}))
        if shown.bit_count() > part.bit_count():
            self._largest[key] = (shown, masks)
        return masks


def add(masks: Masks, others: Masks) -> None:
    """Put more values to some."""
    for key, mask in others.items():
        masks[key] = masks.get(key, 0) | mask


def each_once(operations: Iterable[Operation]) -> list[Operation]:
    """Return operations without repetition; they cannot be hashed, but told apart."""
    return list({id(operation): operation for operation in operations}.values())


def _bits_of(mask: int) -> Iterator[int]:
    """Yield the numbers of the bits that are set."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
