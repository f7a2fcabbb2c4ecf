"""
One nemesis run: a stage, a router, clients and a nemesis, and what they leave.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lsn_consistency import AsyncRouter
from lsn_consistency.events import Event
from tests.faults.clients import Client, Settings
from tests.faults.kinds import KINDS
from tests.faults.nemesis import Episode, Nemesis, Phase, schedule
from tests.faults.record import CALM, Record
from tests.faults.stage import Stage, open_stage
from tests.faults.tally import Tally
from tests.faults.verdict import KindSummary, Summary

GENERATION_SECONDS: Final = 8.0
PROGRESS_SECONDS: Final = 10.0
HEDGE_AFTER: Final = 0.25
JUDGE_SECONDS: Final = 600.0
EXAMPLES: Final = 20

# Enough connections for the clients of a replica that is gone.
_POOL: Final = {"min_size": 4, "max_size": 16}


@dataclass(frozen=True)
class Options:
    """
    Say what a run is like; see ``--help``.
    """

    minutes: float
    seed: int
    clients: int = 24
    replicas: int = 3
    faults: tuple[str, ...] = tuple(KINDS)
    pairs: bool = False
    pace: float = 1.0
    grants: str = "statistics"

    @property
    def command(self) -> str:
        """
        Return the command that replays this run.
        """
        parts = [
            "python -m tests.faults.soak",
            f"--minutes {self.minutes:g}",
            f"--seed {self.seed}",
            f"--clients {self.clients}",
            f"--replicas {self.replicas}",
        ]
        if self.faults != tuple(KINDS):
            parts.append(f"--faults {','.join(self.faults)}")
        if self.pairs:
            parts.append("--pairs")
        if self.grants != "statistics":
            parts.append(f"--grants {self.grants}")
        if self.pace != 1.0:
            parts.append(f"--pace {self.pace:g}")
        return " ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """
    Hold a run's summary, and what a failing run leaves: the windows with violations.
    """

    summary: Summary
    record: Record
    episodes: Sequence[Episode]


def soak(options: Options, report: Callable[[str], None] = print) -> Outcome:
    """
    Run, judge, and return what was found.
    """
    report(f"replay: {options.command}")
    record = Record()
    try:
        with open_stage(options.replicas, options.grants) as stage:
            return asyncio.run(_Run(stage, options, record, report).run())
    finally:
        record.close()


class _Run:
    """
    One run: its router, clients and nemesis.
    """

    def __init__(
        self, stage: Stage, options: Options, record: Record, report: Callable[[str], None]
    ) -> None:
        self._stage = stage
        self._options = options
        self._record = record
        self._report = report
        self._began = time.monotonic()
        self._stopping = asyncio.Event()
        self._events: Counter[str] = Counter()
        faults = schedule(
            options.seed,
            options.faults,
            replicas=options.replicas,
            pairs=options.pairs,
            pace=options.pace,
        )
        self._nemesis = Nemesis(stage, faults, self._on_phase)

    async def run(self) -> Outcome:
        stage, options = self._stage, self._options
        conninfos = {name: stage.conninfo(name) for name in stage.pg.nodes}
        router = AsyncRouter(
            primary=conninfos.pop("primary"),
            replicas=conninfos,
            pool_options=_POOL,
            on_event=self._on_event,
        )
        async with router:
            self._began = time.monotonic()
            settings = Settings(
                router,
                options.seed,
                self._generation,
                self._record.note,
                self._stopping,
                HEDGE_AFTER,
            )
            clients = [Client(number, settings) for number in range(options.clients)]
            tasks = [asyncio.create_task(client.run()) for client in clients]
            self._nemesis.start()
            try:
                await self._watch(settings, tasks)
            finally:
                await asyncio.to_thread(self._nemesis.stop)
                self._stopping.set()
                await asyncio.gather(*tasks)
        minutes = (time.monotonic() - self._began) / 60
        return await asyncio.to_thread(self._conclude, router, clients, minutes)

    async def _watch(self, settings: Settings, tasks: Sequence[asyncio.Task[None]]) -> None:
        ends = self._began + 60 * self._options.minutes
        next_report = self._began + PROGRESS_SECONDS
        while (now := time.monotonic()) < ends and self._nemesis.running:
            done = [task for task in tasks if task.done()]
            for task in done:
                # A client ends by itself only by an error that it did not expect.
                task.result()
            if now >= next_report:
                next_report += PROGRESS_SECONDS
                self._report(self._progress(now))
            if not self._record.losing:
                flying = [number for number, count in settings.in_flight.items() if count]
                self._record.judge_before(min([*flying, self._generation()]))
            await asyncio.sleep(0.5)

    def _generation(self) -> int:
        return int((time.monotonic() - self._began) / GENERATION_SECONDS)

    def _progress(self, now: float) -> str:
        record = self._record
        reads = sum(tally.reads for tally in record.tallies.values())
        unanswered = sum(len(tally.unanswered) for tally in record.tallies.values())
        found = sum(1 for _ in record.violations)
        judged = sum(finding.reads for finding in record.findings)
        return (
            f"{now - self._began:6.0f} s  {record.operations:7,} operations, {reads:,} reads, "
            f"{unanswered} unanswered; {judged:,} judged, {found} violations; "
            f"{len(self._nemesis.episodes)} faults, now {self._now()}"
        )

    def _now(self) -> str:
        episode = self._record.episode
        return f"{episode.name} ({self._record.phase})" if episode else CALM

    # What comes from outside

    def _on_event(self, event: Event) -> None:
        self._events[type(event).__name__] += 1

    def _on_phase(self, episode: Episode, phase: Phase) -> None:
        if phase == "healed" and episode.loses != "nothing":
            self._census(episode)
        self._record.enter(episode, phase)

    def _census(self, episode: Episode | None) -> None:
        before = time.monotonic()
        ledger = self._record.ledger
        after = ledger.since(episode.began) if episode else 0
        present = self._stage.written(after)
        if episode is None:
            ledger.close(present)
        else:
            ledger.census(present, after=after, before=before, episode=episode)

    # The end

    def _conclude(self, router: AsyncRouter, clients: Sequence[Client], minutes: float) -> Outcome:
        record, stage, options = self._record, self._stage, self._options
        errors = [episode.error for episode in self._nemesis.episodes if episode.error]
        switch_points = {}
        if not errors:
            self._census(None)
            switch_points = dict(stage.switch_points())
        record.judge_before(self._generation() + 1)
        record.collect(JUDGE_SECONDS)
        settings = router.settings
        limits = {
            "wait_seconds": settings.wait_seconds,
            "hedge_after": HEDGE_AFTER,
            "probe_timeout": settings.probe_timeout,
            "connect_timeout": settings.connect_timeout,
        }
        summary = Summary(
            seed=options.seed,
            command=options.command,
            version=stage.pg.version,
            minutes=minutes,
            clients=options.clients,
            replicas=options.replicas,
            pairs=options.pairs,
            grants=options.grants,
            sessions=sum(client.sessions for client in clients),
            operations=record.operations,
            judged_reads=sum(finding.reads for finding in record.findings),
            outcomes=dict(record.ledger.outcomes()),
            violations=[str(violation) for violation in record.violations],
            exceptions=record.exceptions(),
            from_replica_to_primary=record.from_replica_to_primary,
            lost=dict(record.ledger.counts),
            problems=record.ledger.problems,
            lost_positions=len(record.lost_positions(switch_points)),
            stuck=record.stuck(switch_points),
            limit_seconds=sum(limits.values()),
            limit_text=" + ".join(f"{name} {value:g}" for name, value in limits.items()),
            kinds=[_of_kind(name, tally) for name, tally in sorted(record.tallies.items())],
            events=dict(self._events),
            errors=errors,
        )
        return Outcome(summary, record, self._nemesis.episodes)


def _of_kind(name: str, tally: Tally) -> KindSummary:
    excuses = Counter(each.excuse for each in tally.unanswered)
    owed = [each for each in tally.unanswered if not each.excuse]
    return KindSummary(
        name=name,
        times=tally.times,
        seconds=tally.seconds,
        answered=tally.answered,
        excused={excuse: number for excuse, number in excuses.items() if excuse},
        owed=len(owed),
        given_up=tally.given_up,
        writes=dict(tally.writes),
        median_seconds=tally.latency(0.5),
        p99_seconds=tally.latency(0.99),
        max_seconds=tally.latency(1.0),
        replica_share=tally.replica_share,
        active_reads=sum(tally.active.values()),
        reasons=dict(tally.reasons),
        examples=[str(each) for each in owed[:EXAMPLES]],
    )
