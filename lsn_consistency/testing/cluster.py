"""
A real primary with streaming replicas on the loopback address, from nothing in about two seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from lsn_consistency.testing._lifecycle import ManagedCluster
from lsn_consistency.testing._workspace import LOOPBACK, Workspace
from lsn_consistency.testing.embedded import EmbeddedNode

__all__ = ["EmbeddedCluster"]


class EmbeddedCluster(ManagedCluster[EmbeddedNode]):
    """
    A primary and its replicas, for the time of a `with` block.

    `bindir` is the folder of PostgreSQL's programs (see `find_programs` for where they are looked
    for), `settings` are server settings over the defaults, `synchronous` is the number of replicas
    that a commit waits for, `progress` is called with a line of text at each step. Everything
    lives in a temporary folder and is gone afterwards, also when this process is killed.

    The database is `postgres`, the superuser `postgres`; the account `app` is a plain role that
    may create tables in the schema public. Raises `ClusterError`.
    """

    def __init__(
        self,
        replicas: int = 2,
        *,
        bindir: str | os.PathLike[str] | None = None,
        settings: Mapping[str, str] | None = None,
        synchronous: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        given = {"listen_addresses": LOOPBACK, **(settings or {})}
        super().__init__(replicas, given, synchronous, progress)
        self._bindir = bindir

    def _make_nodes(self, undo: ExitStack) -> None:
        """Make the temporary folder, in which every node will have one of its own."""
        workspace = Workspace.make(self._bindir, self._report)
        undo.callback(workspace.remove)
        programs = workspace.programs
        self._report(f"PostgreSQL {programs.version} from {programs.bindir}")
        self._primary = EmbeddedNode("primary", "primary", workspace)
        self._replicas = {name: EmbeddedNode(name, "replica", workspace) for name in self._names}
