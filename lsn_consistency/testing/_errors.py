"""
Errors of the testing kit.

    LsnConsistencyError
    └── ClusterError              a cluster could not be started, stopped, broken or healed
        ├── ProgramsNotFoundError there is no PostgreSQL to start one with
        └── ContainersUnavailableError  there is no engine or image for one in containers
"""

from __future__ import annotations

from pathlib import Path

from lsn_consistency.exceptions import LsnConsistencyError

__all__ = [
    "ClusterError",
    "ContainersUnavailableError",
    "ProgramsNotFoundError",
    "last_lines",
    "tail",
]

LOG_TAIL_LINES = 25
LOG_TAIL_BYTES = 16_384


class ClusterError(LsnConsistencyError):
    """
    Say what a test cluster could not do, with the end of the log that explains it.

    `log_tail` holds the last lines of the server log or of the program's output; it is
    part of the message as well.
    """

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message, log_tail)
        self.message = message
        self.log_tail = log_tail

    def __str__(self) -> str:
        if not self.log_tail:
            return self.message
        return f"{self.message}\n--- last lines of the log ---\n{self.log_tail}"


class ProgramsNotFoundError(ClusterError):
    """
    Say that no PostgreSQL programs were found, and how to get them.
    """


class ContainersUnavailableError(ClusterError):
    """
    Say what containers cannot be made without: a Docker engine, an image, the client for them.
    """


def tail(log: Path) -> str:
    """
    Return the last lines of a log file, or an empty text when there is none.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            return last_lines(file.read())
    except OSError:
        return ""


def last_lines(text: bytes) -> str:
    """
    Return the last lines of the content of a log.
    """
    lines = text[-LOG_TAIL_BYTES:].decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])
