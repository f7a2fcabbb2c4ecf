"""
The command ``lsn-consistency``.
"""

from __future__ import annotations

from lsn_consistency.cli._main import main

__all__ = ["main"]
