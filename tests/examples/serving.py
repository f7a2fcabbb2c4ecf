"""Run an example the way its docstring says, in a process of its own."""

from __future__ import annotations

import ast
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from lsn_consistency.testing import EmbeddedCluster

ROOT = Path(__file__).parents[2]
START_SECONDS = 30.0


def documented_commands(name: str) -> list[str]:
    """Return the commands that the docstring of an example tells to start it with."""
    tree = ast.parse((ROOT / "examples" / f"{name}.py").read_text())
    lines = (ast.get_docstring(tree) or "").splitlines()
    return [line.strip() for line in lines if re.match(r"    (uvicorn|python) ", line)]


def node_variables(pg: EmbeddedCluster, database: str) -> dict[str, str]:
    """Return the environment variables that name the servers of a cluster to an example."""
    return {name.upper(): node.conninfo_for(dbname=database) for name, node in pg.nodes.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def running(
    command: str, log: Path, variables: Mapping[str, str], folder: Path = ROOT
) -> Iterator[str]:
    """Run a documented command on a free port, and give its base URL once it answers."""
    port = free_port()
    words = shlex.split(re.sub(r"--port \d+", f"--port {port}", command))
    assert str(port) in words
    words[:1] = [sys.executable] if words[0] == "python" else [sys.executable, "-m", words[0]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_for(port, process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=20)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(f"nothing listens on port {port}:\n{log.read_text()}")


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=20, trust_env=False)


def answer(response: httpx.Response) -> Any:
    assert response.is_success, response.text
    return response.json()
