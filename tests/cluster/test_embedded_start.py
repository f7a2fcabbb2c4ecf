"""How the embedded cluster starts, with which settings, and what is left when it cannot."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from lsn_consistency.testing import ClusterError, EmbeddedCluster, embedded
from lsn_consistency.testing._reaper import processes_in
from lsn_consistency.testing._workspace import LOOPBACK, Workspace, free_port


def test_a_taken_port_is_given_up_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose port is taken between choosing and using it starts on another one."""
    choose = free_port
    with socket.socket() as other:
        other.bind((LOOPBACK, 0))
        other.listen()
        ports = iter([other.getsockname()[1]])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports, None) or choose())
        with EmbeddedCluster(replicas=1) as pg:
            assert pg.primary.port != other.getsockname()[1]
            assert pg.primary.port == pg.primary.value("SELECT inet_server_port()")


def test_settings_and_synchronous_replicas_are_taken() -> None:
    """Settings go over the defaults; a commit waits for as many replicas as asked for."""
    steps: list[str] = []
    settings = {"fsync": "on", "application_name": "it's"}
    with EmbeddedCluster(1, settings=settings, synchronous=1, progress=steps.append) as pg:
        assert "on" == pg.primary.value("SHOW fsync")
        assert "it's" == pg.replicas["replica_1"].value("SHOW application_name")
        assert [("quorum",)] == pg.primary.execute("SELECT sync_state FROM pg_stat_replication")
        folder = pg.primary.datadir.parent
    assert "waiting for the replicas" in steps
    assert (False, []) == (folder.exists(), processes_in(folder))


def test_a_failed_start_shows_the_log_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that refuses its settings is an error with its own words, and is cleared up."""
    made: list[Workspace] = []
    make = Workspace.make

    def remember(*arguments: Any) -> Workspace:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(Workspace, "make", remember)
    pg = EmbeddedCluster(1, settings={"shared_buffers": "a lot"})
    with pytest.raises(ClusterError, match="primary did not start") as caught:
        pg.start()
    assert 'invalid value for parameter "shared_buffers": "a lot"' in caught.value.log_tail
    assert caught.value.log_tail in str(caught.value)
    assert [False] == [workspace.folder.exists() for workspace in made]
    with pytest.raises(ClusterError, match="the cluster is not running"):
        _ = pg.primary


def test_a_cluster_starts_once_at_a_time_and_again_after_its_end() -> None:
    """Starting twice is an error; a stopped cluster can be started again."""
    pg = EmbeddedCluster(replicas=0)
    pg.start()
    with pytest.raises(ClusterError, match="running already"):
        pg.start()
    node = pg.primary
    pg.stop()
    pg.stop()
    assert not node.running
    with pg:
        assert ["primary"] == list(pg.nodes)
        pg.heal()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"replicas": -1}, "replicas is -1: it must be 0 to 16"),
        ({"replicas": 17}, "replicas is 17: it must be 0 to 16"),
        ({"replicas": 2, "synchronous": 3}, "synchronous is 3: it must be 0 to 2"),
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, int], problem: str) -> None:
    """What cannot be started is refused before anything is."""
    with pytest.raises(ClusterError, match=problem):
        EmbeddedCluster(**options)  # type: ignore[arg-type]
