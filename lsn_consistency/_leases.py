"""
A connection in use, and what a block of it is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

from lsn_consistency._core import Core, Facts
from lsn_consistency._observation import Observation
from lsn_consistency._steps import Plan
from lsn_consistency._verdicts import Lost
from lsn_consistency.consistency import Consistency
from lsn_consistency.route import Route
from lsn_consistency.session import Session
from lsn_consistency.tokens import Token

NO_POSITIONS: Final = Token()


@dataclass(slots=True)
class Lease:
    """
    Hold a connection in use, and why it was given; ``token`` is the session's from before that.

    ``transaction`` is that of a read behind a pooler; ``seen`` is the server at the transaction's
    end; ``shares`` whether the read waits for a probe of its node, as was decided when it ended.
    """

    node: str
    conn: Any
    facts: Facts
    route: Route
    level: Consistency
    token: Token = NO_POSITIONS
    fallback: bool = False
    lost: Lost | None = None
    transaction: str | None = None
    seen: Observation | None = None
    shares: bool | None = None


class Use(Protocol):
    """
    Describe what a block is for: the plans of its start and of its end.
    """

    def open(self, core: Core, session: Session) -> Plan[Lease]:
        """
        Take a connection.
        """

    def commit(self, core: Core, lease: Lease) -> Plan[None] | None:
        """
        End a transaction that went well; None where the driver's own commit is all that it takes.
        """

    def close(self, core: Core, session: Session, lease: Lease, *, interrupted: bool) -> Plan[None]:
        """
        Give it back; ``interrupted`` says that there is no time to ask anybody.
        """
