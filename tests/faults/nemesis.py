"""
The nemesis: which fault comes when, from a seed, and the thread that carries it out.

`schedule` is pure: the same seed, kinds and replicas give the same faults in the same order. The
`Nemesis` carries a schedule out on a `Stage` and keeps the episodes.
"""

from __future__ import annotations

import math
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Final, Literal

from lsn_consistency import Lsn
from tests.faults.kinds import KINDS, Fault, Halves, Loss, Scope, target
from tests.faults.stage import Stage

_SCOPES: Final[tuple[Scope, ...]] = ("failover", "primary", "replica")
Phase = Literal["breaks", "broken", "heals", "healed"]

SETTLE_SECONDS: Final = (1.0, 2.0)


# The schedule


def schedule(
    seed: int,
    kinds: Sequence[str] = tuple(KINDS),
    *,
    replicas: int = 3,
    pairs: bool = False,
    pace: float = 1.0,
) -> Iterator[tuple[Fault, ...]]:
    """
    Yield faults without end: single ones, or with ``pairs`` two that come together.

    Every kind comes once before any comes again. ``pace`` stretches or shortens all times. Of a
    pair at most one hits the primary, and neither changes who the primary is.
    """
    chance = random.Random(f"nemesis {seed}")
    numbers = count(1)
    while True:
        deck = list(kinds)
        chance.shuffle(deck)
        while deck:
            first = _drawn(chance, deck.pop(), numbers, replicas, pace)
            partner = _partner(first, deck) if pairs else None
            if partner is None:
                yield (first,)
                continue
            deck.remove(partner)
            second = _drawn(chance, partner, numbers, replicas, pace)
            if first.target == second.target:
                second = replace(second, target=(second.target + 1) % replicas)
            # What breaks last is healed first: without its primary no replica can be healed.
            yield tuple(sorted((first, second), key=lambda fault: -_SCOPES.index(fault.scope)))


def _drawn(
    chance: random.Random, kind: str, numbers: Iterator[int], replicas: int, pace: float
) -> Fault:
    low, high = KINDS[kind].seconds
    return Fault(
        next(numbers),
        kind,
        chance.randrange(replicas),
        round(pace * chance.uniform(low, high), 3),
        round(pace * chance.uniform(*SETTLE_SECONDS), 3),
        round(chance.random(), 3),
    )


def _partner(first: Fault, deck: Iterable[str]) -> str | None:
    taken = first.scope
    if taken == "failover":
        return None
    allowed = ("replica",) if taken == "primary" else ("replica", "primary")
    return next((kind for kind in reversed(list(deck)) if KINDS[kind].scope in allowed), None)


# Carrying out


@dataclass(slots=True)
class Episode:
    """
    What one fault, or one pair, was like: whom it hit, and when, in monotonic seconds.

    The first half was carried out from ``began`` to ``broken``, the second half from ``healing``
    on; at ``healed`` the cluster had caught up. ``reached`` is the position that the replicas had
    received, or the new primary had, when the fault was there. ``error`` is what the testing kit
    could not do.
    """

    faults: tuple[Fault, ...]
    nodes: tuple[str, ...]
    began: float
    broken: float = math.inf
    healing: float = math.inf
    healed: float = math.inf
    reached: Lsn | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """
        Return the kind, or both kinds of a pair.
        """
        return " + ".join(fault.kind for fault in self.faults)

    @property
    def seconds(self) -> float:
        """
        Return how long it took from the first half's beginning until all was well again.
        """
        return self.healed - self.began

    @property
    def loses(self) -> Loss:
        """
        Return the most that one of the faults may lose.
        """
        return max((KINDS[fault.kind].loses for fault in self.faults), key=_LOSSES.index)

    @property
    def deposed(self) -> str | None:
        """
        Return the primary that was deposed, if one was.
        """
        hit = zip(self.faults, self.nodes, strict=True)
        return next((node for fault, node in hit if fault.scope == "failover"), None)


_LOSSES: Final[tuple[Loss, ...]] = ("nothing", "asynchronous", "acknowledged")


class Nemesis:
    """
    Carry out a schedule in a thread until told to stop.

    ``on_phase`` is called in that thread as each episode comes to its next phase; "healed" means
    that all replicas have caught up too.
    """

    def __init__(
        self,
        stage: Stage,
        faults: Iterator[tuple[Fault, ...]],
        on_phase: Callable[[Episode, Phase], object] = lambda episode, phase: None,
    ) -> None:
        self.episodes: list[Episode] = []
        self._stage = stage
        self._faults = faults
        self._on_phase = on_phase
        self._thread = threading.Thread(target=self._run, name="nemesis")

    def start(self) -> None:
        """
        Start the thread.
        """
        self._thread.start()

    def stop(self) -> None:
        """
        End the run and wait for it: the fault under way is healed first.
        """
        self._stage.stopping.set()
        self._thread.join()

    @property
    def running(self) -> bool:
        """
        Tell whether there are faults to come; one that cannot be carried out ends them.
        """
        return self._thread.is_alive()

    def _run(self) -> None:
        self._stage.hold(SETTLE_SECONDS[0])
        for faults in self._faults:
            if self._stage.stopping.is_set():
                return
            nodes = tuple(target(self._stage, fault).name for fault in faults)
            episode = Episode(faults, nodes, time.monotonic())
            self.episodes.append(episode)
            try:
                self._play(episode)
            except Exception:
                episode.error = traceback.format_exc()
                return

    def _play(self, episode: Episode) -> None:
        begun: list[Halves] = []
        self._on_phase(episode, "breaks")
        try:
            for fault in episode.faults:
                begun.append(KINDS[fault.kind].halves(self._stage, fault))
                next(begun[-1])
            episode.broken = time.monotonic()
            episode.reached = self._stage.reached(promoted=episode.deposed is not None)
            self._on_phase(episode, "broken")
            self._stage.hold(max(fault.seconds for fault in episode.faults))
        finally:
            episode.healing = time.monotonic()
            self._on_phase(episode, "heals")
            for half in reversed(begun):
                next(half, None)
        self._stage.wait_settled()
        episode.healed = time.monotonic()
        self._on_phase(episode, "healed")
        self._stage.hold(max(fault.settle_seconds for fault in episode.faults))
