"""
The servers of the demo, and what the page may do to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from starlette.concurrency import run_in_threadpool

from lsn_consistency.demo.shop import SCHEMA
from lsn_consistency.testing import EmbeddedCluster, Node

REPLICAS: Final = 2
LATE_REPLICA: Final = "replica_2"
ACCOUNT: Final = "app"
"""A plain account: the router needs no privileges."""

Action = Literal["pause", "resume", "delay", "stop", "start"]
ACTIONS: Final[tuple[Action, ...]] = get_args(Action)


class ImpossibleError(Exception):
    """
    Say why an action is not possible now.
    """


@dataclass(slots=True)
class _State:
    """
    Remember what was done to a server, so that showing it asks no server.
    """

    running: bool = True
    paused: bool = False
    delay_seconds: float = 0.0
    busy: bool = False


class Stage:
    """
    Hold the running servers by name, and carry out one action at a time on each.
    """

    def __init__(self, cluster: EmbeddedCluster) -> None:
        self._nodes: Mapping[str, Node] = cluster.nodes
        self._states = {name: _State() for name in self._nodes}

    @classmethod
    def prepare(cls, cluster: EmbeddedCluster, apply_delay: float) -> Stage:
        """
        Make the shop's tables on a fresh cluster, then delay `LATE_REPLICA`; blocks.
        """
        stage = cls(cluster)
        with cluster.primary.connect(user=ACCOUNT) as conn:
            conn.execute(SCHEMA)
        cluster.wait_caught_up()
        if apply_delay:
            stage._carry_out(LATE_REPLICA, "delay", apply_delay)
        return stage

    @property
    def primary(self) -> str:
        """
        Return the primary's conninfo.
        """
        return self._nodes["primary"].conninfo_for(ACCOUNT)

    @property
    def replicas(self) -> dict[str, str]:
        """
        Return the replicas' conninfos by name.
        """
        return {
            name: node.conninfo_for(ACCOUNT)
            for name, node in self._nodes.items()
            if node.role == "replica"
        }

    def name_of(self, port: int) -> str:
        """
        Return the name of the server that says it listens on ``port``.
        """
        return next((name for name, node in self._nodes.items() if node.port == port), "unknown")

    def describe(self, name: str) -> dict[str, Any]:
        """
        Return what was done to a server, from memory.
        """
        state = self._states[name]
        return {
            "port": self._nodes[name].port,
            "running": state.running,
            "paused": state.paused,
            "delay_seconds": state.delay_seconds,
            "busy": state.busy,
        }

    async def act(self, name: str, action: Action, seconds: float = 0.0) -> str:
        """
        Carry out an action, return when it is in force, and say what was done.

        Raises `ImpossibleError` when it makes no sense now, and `ClusterError` when it fails.
        """
        state = self._states[name]
        if state.busy:
            raise ImpossibleError(f"{name} is still busy with another action")
        if action == "start" and state.running:
            raise ImpossibleError(f"{name} is running already")
        if action != "start" and not state.running:
            raise ImpossibleError(f"{name} is stopped")
        if action in ("pause", "resume", "delay") and name == "primary":
            raise ImpossibleError("the primary replays nothing")
        state.busy = True
        try:
            return await run_in_threadpool(self._carry_out, name, action, seconds)
        finally:
            state.busy = False

    def _carry_out(self, name: str, action: Action, seconds: float) -> str:
        node, state = self._nodes[name], self._states[name]
        if action == "start":
            node.start()
            # A pause ends with the server, a delay is a setting and stays.
            state.running, state.paused = True, False
            return f"{name} started"
        if action == "stop":
            state.running = False
            node.stop()
            return f"{name} stopped"
        if action == "delay":
            node.apply_delay(seconds)
            state.delay_seconds = seconds
            return f"{name} applies commits {seconds:g} s late" if seconds else f"{name}: no delay"
        switch: Callable[[], None] = node.pause_replay if action == "pause" else node.resume_replay
        switch()
        state.paused = action == "pause"
        return f"replay of {name} {action}d"
