"""
A small shop on a real primary with two replicas, to see what the tokens do.

``lsn-consistency demo`` serves it with a page, ``lsn-consistency demo --check`` judges the same
application over HTTP. It needs the extra: ``pip install "lsn-consistency[demo]"``.
"""

from __future__ import annotations

from typing import Final

MAX_APPLY_DELAY_SECONDS: Final = 10.0
"""The longest delay of a replica, well below the time that the testing kit waits for one."""
