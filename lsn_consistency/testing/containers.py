"""
A real primary with streaming replicas, each on a machine of its own: a container with networks.

What `EmbeddedCluster` cannot have is a network that fails. Here a node can be disconnected from
its clients, from the other nodes, or from all: packets vanish, no connection is closed, and
nothing refuses one. Clients connect to the containers' own addresses, as the ports that an engine
publishes are served by a proxy, which would answer in the place of a node that is gone. So the
engine has to be on this machine and to run Linux: Docker Desktop and rootless engines hide these
addresses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import MappingProxyType

import psycopg

from lsn_consistency.testing._container_node import (
    CLIENTS,
    REPLICATION,
    ContainerNode,
    NetworkName,
)
from lsn_consistency.testing._errors import ContainersUnavailableError
from lsn_consistency.testing._lifecycle import ManagedCluster
from lsn_consistency.testing._machines import Machine, Network, open_engine

__all__ = ["ContainerCluster", "ContainerNode", "NetworkName"]

DEFAULT_IMAGE = "postgres:18"
IMAGE_VARIABLE = "LSN_CONSISTENCY_IMAGE"

SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "listen_addresses": "*",
        # How soon both ends of a stream give up a peer that has fallen silent. PostgreSQL's own
        # default is 60 s; a test that heals a partition would have to wait for it.
        "wal_receiver_timeout": "5s",
        "wal_sender_timeout": "5s",
    }
)


class ContainerCluster(ManagedCluster[ContainerNode]):
    """
    A primary and its replicas in containers, for the time of a `with` block.

    `image` is an image with PostgreSQL 14 or newer, its programs on PATH, sh and an account
    postgres; by default what the environment variable LSN_CONSISTENCY_IMAGE names, else the
    official postgres:18. The other arguments are those of `EmbeddedCluster`, and so is all that
    can be done with the cluster and its nodes; these can be disconnected as well.

    Raises `ContainersUnavailableError` if there is no Docker engine or no such image, and
    `ClusterError` for all else.
    """

    def __init__(
        self,
        replicas: int = 2,
        *,
        image: str | None = None,
        settings: Mapping[str, str] | None = None,
        synchronous: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(replicas, {**SETTINGS, **(settings or {})}, synchronous, progress)
        self.image = image or os.environ.get(IMAGE_VARIABLE) or DEFAULT_IMAGE

    def _make_nodes(self, undo: ExitStack) -> None:
        """Make both networks and all machines, these at the same time."""
        self._report(f"looking for a Docker engine with {self.image}")
        engine = open_engine(self.image)
        undo.callback(engine.client.close)
        self._report("starting the machines")
        networks: dict[str, Network] = {}
        for purpose in (CLIENTS, REPLICATION):
            networks[purpose] = Network(engine, purpose, internal=purpose == REPLICATION)
            undo.callback(networks[purpose].remove)
            networks[purpose].make()
        names = ["primary", *self._names]
        machines = [Machine(name, place, self.image, networks) for place, name in enumerate(names)]
        undo.callback(_each, Machine.remove, machines)
        _each(Machine.boot, machines)
        primary, *replicas = machines
        self._primary = ContainerNode("primary", "primary", primary)
        self._replicas = {each.name: ContainerNode(each.name, "replica", each) for each in replicas}

    def _start_primary(self) -> None:
        """Start the primary; say so if it runs and this process cannot reach it."""
        try:
            super()._start_primary()
        except psycopg.OperationalError as error:
            raise ContainersUnavailableError(
                f"the containers' own addresses ({self.primary.host}) cannot be reached: the "
                f"Docker engine must run on this machine, not in Docker Desktop or rootless: "
                f"{error}"
            ) from error

    def heal(self) -> None:
        """
        Undo every fault of every node, and return when all replicas have caught up.

        As in an embedded cluster; disconnected nodes are connected again before.
        """
        # Whoever leads now keeps its data: a former primary that comes back has no say.
        self._chosen = self.leader
        for node in self.nodes.values():
            node.reconnect()
        super().heal()


def _each(action: Callable[[Machine], None], machines: list[Machine]) -> None:
    """Do something with all machines at the same time; the first error is raised after all."""
    with ThreadPoolExecutor(len(machines), thread_name_prefix="machine") as pool:
        futures = [pool.submit(action, machine) for machine in machines]
    for future in futures:
        future.result()
