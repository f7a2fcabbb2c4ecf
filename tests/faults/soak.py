"""
The nemesis run: many clients, faults at random, and a verdict.

    python -m tests.faults.soak --minutes 20
    python -m tests.faults.soak --minutes 1 --seed 7 --faults freeze_replica,crash_primary

A primary and some replicas run on this machine, each behind a proxy. Clients write and read
through one `AsyncRouter` while servers and networks fail, one fault at a time; the checker judges
everything that they saw. The seed decides which faults come, in which order and for how long, and
what each client does; it is printed, and the same seed replays the same choices.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lsn_consistency import AsyncRouter
from lsn_consistency.events import Event
from tests.faults.clients import Client, Settings
from tests.faults.kinds import KINDS, describe_kinds
from tests.faults.nemesis import Episode, Nemesis, Phase, schedule
from tests.faults.record import CALM, Record
from tests.faults.stage import GRANTS, Stage, open_stage
from tests.faults.tally import Tally
from tests.faults.verdict import KindSummary, Summary, as_json, failures, markdown

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


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run as the arguments say; return 0 if every criterion is met, else 1.
    """
    options, given = _parsed(arguments)
    with _quiet("psycopg", "lsn_consistency"):
        outcome = soak(options, lambda line: print(line, flush=True))
    page = markdown(outcome.summary)
    print(f"\n{page}")
    if given.markdown:
        given.markdown.write_text(page)
    if given.json:
        given.json.write_text(json.dumps(_dump(outcome), indent=1, default=_plain))
    failed = failures(outcome.summary)
    if failed:
        print(f"{len(failed)} criteria not met; replay: {options.command}")
    return 1 if failed else 0


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    # Servers fail all the time here; what matters of it is counted.
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _parsed(arguments: Sequence[str] | None) -> tuple[Options, argparse.Namespace]:
    kinds = "\n".join(f"  {name:26} {summary}" for name, summary in describe_kinds().items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.soak",
        description=__doc__,
        epilog=f"kinds of faults:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, help="how long the clients run (default: 20)")
    add("--seed", type=int, help="replay the choices of another run (default: a new seed)")
    add("--clients", type=int, default=24, help="how many clients there are (default: 24)")
    add("--replicas", type=int, default=3, help="how many replicas there are (default: 3)")
    add("--faults", help="kinds of faults, separated by commas (default: all, see below)")
    add("--pairs", action="store_true", help="two faults at a time; availability is not judged")
    add("--pace", type=float, default=1.0, help="stretch all times of the faults (default: 1)")
    add(
        "--grants",
        choices=sorted(GRANTS),
        default="statistics",
        help="what the router's account may do: statistics is pg_read_all_stats (default), "
        "replication that and REPLICATION; with none availability is not judged",
    )
    add("--json", type=Path, help="write the summary, and the history of violations, to a file")
    add("--markdown", type=Path, help="write the summary as Markdown to a file")
    given = parser.parse_args(arguments)
    faults = tuple(given.faults.split(",")) if given.faults else tuple(KINDS)
    unknown = sorted(set(faults) - set(KINDS))
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}")
    if min(given.minutes, given.clients, given.replicas, given.pace) <= 0:
        parser.error("--minutes, --clients, --replicas and --pace take positive numbers")
    options = Options(
        minutes=given.minutes,
        seed=secrets.randbelow(10**6) if given.seed is None else given.seed,
        clients=given.clients,
        replicas=given.replicas,
        faults=faults,
        pairs=given.pairs,
        pace=given.pace,
        grants=given.grants,
    )
    return options, given


def _dump(outcome: Outcome) -> dict[str, Any]:
    began = min((episode.began for episode in outcome.episodes), default=0.0)
    return {
        "summary": as_json(outcome.summary),
        "episodes": [
            {
                "name": episode.name,
                "nodes": episode.nodes,
                "faults": [repr(fault) for fault in episode.faults],
                **{
                    moment: round(getattr(episode, moment) - began, 3)
                    for moment in ("began", "broken", "healing", "healed")
                },
            }
            for episode in outcome.episodes
        ],
        "history": {
            number: [_operation(operation) for operation in operations]
            for number, operations in outcome.record.suspect.items()
        },
    }


def _operation(operation: Any) -> dict[str, Any]:
    fields = {name: getattr(operation, name) for name in operation.__dataclass_fields__}
    fields["values"] = {str(key): sorted(values) for key, values in operation.values.items()}
    fields["promised"] = sorted(operation.promised)
    return fields


def _plain(value: Any) -> Any:
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
