"""
The entry point: arguments in, exit status out.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

from lsn_consistency.cli._parser import make_parser
from lsn_consistency.exceptions import ConfigurationError
from lsn_consistency.testing import ClusterError, ProgramsNotFoundError

FAILED: Final = 1
UNUSABLE: Final = 2
INTERRUPTED: Final = 128 + signal.SIGINT

_NEEDED: Final = ("httpx", "rich", "uvicorn")
_INSTALL: Final = 'pip install "lsn-consistency[demo]"'


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command and return its exit status.

    ``argv`` are the arguments without the program's name; None takes those of the process. Wrong
    usage, ``--help`` and ``--version`` end in `SystemExit`, as argparse does it.
    """
    arguments = make_parser().parse_args(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _complain(f"the demo needs {' and '.join(missing)}: {_INSTALL}", UNUSABLE)
    try:
        with _ended_by_sigterm():
            return _run_demo(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ProgramsNotFoundError as error:
        hint = f"{_INSTALL}, or pass --bindir"
        return _complain(f"there is no PostgreSQL to start: {hint}\n{error}", UNUSABLE)
    except ConfigurationError as error:
        return _complain(str(error), UNUSABLE)
    except ClusterError as error:
        return _complain(str(error), FAILED)


def _run_demo(arguments: argparse.Namespace) -> int:
    # Imported here: it needs packages that the library itself does not.
    from lsn_consistency.demo.serving import Options, PortInUseError, check, serve

    options = Options(
        port=0 if arguments.check else arguments.port,
        apply_delay=arguments.apply_delay,
        bindir=arguments.bindir,
        open_browser=arguments.open,
        reads=arguments.reads,
        secret_key=arguments.secret_key,
    )
    try:
        return check(options) if arguments.check else serve(options)
    except PortInUseError as error:
        return _complain(f"{error}: choose another with --port, or a free one with --port 0", 2)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """
    Let SIGTERM end the block as Ctrl-C does: what was started is stopped on the way out.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(text: str, status: int) -> int:
    print(f"lsn-consistency: {text}", file=sys.stderr)
    return status
