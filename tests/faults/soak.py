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
import json
import logging
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.kinds import KINDS, describe_kinds
from tests.faults.page import markdown
from tests.faults.run import Options, Outcome, soak
from tests.faults.stage import GRANTS
from tests.faults.verdict import as_json, failures


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
