"""The demo on real servers: its check, its page's interface, and that nothing is left of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import lsn_consistency
from lsn_consistency.session import DEFAULT_HEADER_NAME
from lsn_consistency.testing._reaper import process_table, processes_in

ROOT = Path(next(iter(lsn_consistency.__path__))).parent
WAIT_SECONDS = 60.0
DEMO = ("-m", "lsn_consistency", "demo")

# The routed reads of the check ask for nothing; whether it notices is the question.
TOKENS_IGNORED = """
import sys
from lsn_consistency import Consistency
from lsn_consistency.cli import main
from lsn_consistency.demo import api

api.LEVELS = {**api.LEVELS, "causal": Consistency.EVENTUAL}
sys.exit(main(["demo", "--check", "--reads", "80"]))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary folder of the demo's own, which the servers' account may enter."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python with everything temporary in one folder."""
    process = subprocess.Popen(
        [sys.executable, "-u", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "COLUMNS": "80"},
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return the line with the text; the process ends the wait if it ends without one."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return line
    raise AssertionError(f"it ended without saying {text!r}: {''.join(lines)}")


def what_is_left(folder: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the files in the folder, and the processes that name it or work in it."""
    named = [row for row in process_table().values() if str(folder) in " ".join(row.argv)]
    return os.listdir(folder), [row.argv for row in named + processes_in(folder)]


def test_the_check_passes_and_leaves_nothing(folder: Path) -> None:
    """``demo --check`` finds no stale read with tokens and stale ones without, and ends with 0."""
    with running(folder, *DEMO, "--check", "--reads", "80") as process:
        told, _ = process.communicate(timeout=WAIT_SECONDS)
    found = re.search(r"^0 of 80 reads with a token were stale, (\d+) of 80 without", told, re.M)
    assert found is not None, told
    assert int(found[1]) > 0
    assert (0, "PASSED") == (process.returncode, told.splitlines()[-1].strip())
    totals = re.search(r"^all +80 +(\d+) +(\d+) ", told, re.M)
    assert totals is not None, told
    assert int(totals[1]) > 0
    assert int(totals[2]) > 0
    assert ([], []) == what_is_left(folder)


def test_the_check_fails_when_tokens_are_ignored(folder: Path) -> None:
    """If the router served any replica, the check would say so and end with 1."""
    with running(folder, "-c", TOKENS_IGNORED) as process:
        told, _ = process.communicate(timeout=WAIT_SECONDS)
    assert 1 == process.returncode, told
    assert re.search(r"^FAILED: \d+ reads with a token were stale$", told, re.M), told
    assert ([], []) == what_is_left(folder)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_a_signal_while_it_starts_leaves_nothing(
    folder: Path, number: signal.Signals, status: int
) -> None:
    """A signal ends the demo also before it serves, with the status that shells expect."""
    with running(folder, *DEMO, "--port", "0") as process:
        read_until(process, "copying the primary")
        process.send_signal(number)
        process.communicate(timeout=WAIT_SECONDS)
    assert (status, ([], [])) == (process.returncode, what_is_left(folder))


def test_the_page_and_its_controls(folder: Path) -> None:
    """A visitor orders, pauses replicas and sees who answers; Ctrl-C ends everything."""
    with running(folder, *DEMO, "--port", "0") as process:
        url = read_until(process, "http://").split()[-1]
        assert len(processes_in(folder)) > 3
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
            visitor = Visitor(http)
            visit_page(http)
            visit_shop(visitor)
            visit_servers(visitor)
            refuse_nonsense(http)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=WAIT_SECONDS)
    assert 130 == process.returncode, told
    assert "Traceback" not in told
    assert ([], []) == what_is_left(folder)


class Visitor:
    """One browser: its cookies carry customer and token."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.http.post(path, json=body)
        assert answer.is_success, answer.text
        payload: dict[str, Any] = answer.json()
        return payload

    def order(self) -> int:
        number: int = self.post("/api/orders", product_id=2)["ids"][0]
        return number

    def read(self, level: str = "causal") -> tuple[dict[str, Any], dict[str, Any]]:
        answer = self.http.get("/api/orders", params={"level": level})
        assert answer.is_success, answer.text
        return answer.json()["read"], answer.json()["twin"]

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {node["name"]: node for node in self.http.get("/api/state").json()["nodes"]}

    def until(self, condition: Callable[[dict[str, dict[str, Any]]], bool]) -> None:
        """Wait until the picture of the servers is as it should be."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition(nodes := self.nodes()):
            assert time.monotonic() < deadline, nodes
            time.sleep(0.05)


def ids(view: dict[str, Any]) -> list[int]:
    return [order["id"] for order in view["orders"]]


def visit_page(http: httpx.Client) -> None:
    """The page loads nothing from elsewhere, and all that it loads is there."""
    page = http.get("/")
    policy = page.headers["Content-Security-Policy"]
    assert (200, "default-src 'self'") == (page.status_code, policy)
    links = set(re.findall(r'(?:src|href)="([^"]+)"', page.text))
    scripts = http.get("/page/main.js").text
    links |= {f"/page/{name}" for name in re.findall(r'from "\./(\w+\.js)"', scripts)}
    assert {"/page/style.css", "/page/main.js", "/page/view.js"} <= links
    assert {200} == {http.get(link).status_code for link in links}


def visit_shop(visitor: Visitor) -> None:
    """An order is there in the next read, which a replica serves that says so itself."""
    first = visitor.order()
    nodes = visitor.nodes()
    routed, _ = visitor.read()
    assert [first] == ids(routed)
    assert routed["port"] == nodes[routed["node"]]["port"]
    assert routed["node"] == routed["route"]
    token = visitor.http.get("/api/state").json()["token"]
    assert 1 == len(token["positions"])
    strong, _ = visitor.read("strong")
    assert ("primary", "primary_required") == (strong["node"], strong["reason"])
    before = strong["products"][0]["stock"]
    burst = visitor.post("/api/burst", product_id=1, count=3)["ids"]
    routed, _ = visitor.read()
    assert ([*burst[::-1], first], before - 3) == (ids(routed), routed["products"][0]["stock"])
    visitor.post("/api/restock")
    routed, _ = visitor.read()
    assert before == routed["products"][0]["stock"]


def visit_servers(visitor: Visitor) -> None:
    """With both replicas paused the primary answers; afterwards a replica does again."""
    assert 0.3 == visitor.nodes()["replica_2"]["delay_seconds"]
    visitor.post("/api/nodes/replica_2/delay", seconds=0)
    for name in ("replica_1", "replica_2"):
        assert visitor.post(f"/api/nodes/{name}/pause")["paused"]
    number = visitor.order()
    routed, twin = visitor.read()
    assert ("primary", True) == (routed["node"], number in ids(routed))
    assert routed["reason"] in ("not_caught_up", "lag_exceeded")
    assert visitor.nodes()["primary"]["port"] == routed["port"]
    assert number not in ids(twin)
    assert visitor.nodes()["replica_1"]["missing_bytes"] > 0
    for name in ("replica_1", "replica_2"):
        assert not visitor.post(f"/api/nodes/{name}/resume")["paused"]
    visitor.until(lambda nodes: nodes["replica_1"]["missing_bytes"] == 0)
    visitor.until(lambda nodes: (nodes["replica_1"]["lag_seconds"] or 0) < 1)
    routed, _ = visitor.read()
    assert ("caught_up", True) == (routed["reason"], number in ids(routed))
    assert routed["node"].startswith("replica_")
    without_primary(visitor, number)


def without_primary(visitor: Visitor, number: int) -> None:
    """A stopped primary is an error for orders, and none for reads that a replica can serve."""
    assert not visitor.post("/api/nodes/primary/stop")["running"]
    refused = visitor.http.post("/api/orders", json={"product_id": 1})
    assert (503, True) == (refused.status_code, bool(refused.json()["error"]))
    routed, _ = visitor.read("read_your_writes")
    assert ("primary_down", True) == (routed["reason"], number in ids(routed))
    assert visitor.post("/api/nodes/primary/start")["running"]
    visitor.until(lambda nodes: bool(nodes["primary"]["healthy"]))
    assert visitor.order() > number
    entries = visitor.http.get("/api/state").json()["entries"]
    told = [entry["text"] for entry in entries if entry["kind"] == "Fault"]
    assert ["primary stopped", "primary started"] == told[-2:]
    assert [entries[-1]] == visitor.http.get(
        "/api/state", params={"after": entries[-2]["number"]}
    ).json()["entries"]


def refuse_nonsense(http: httpx.Client) -> None:
    """What makes no sense, or comes from another site, is refused and never a 500."""
    asked = {
        "unknown level": http.get("/api/orders?level=best"),
        "no number": http.get("/api/state?after=-1"),
        "another site": http.get("/", headers={"Host": "example.org"}),
        "a form": http.post("/api/burst", data={"product_id": "1"}),
        "no JSON": http.post("/api/burst", content="{", headers=JSON),
        "no object": http.post("/api/burst", content="[1]", headers=JSON),
        "too long": http.post("/api/burst", content=" " * 600, headers=JSON),
        "too many": http.post("/api/burst", json={"product_id": 1, "count": 51}),
        "no product": http.post("/api/orders", json={"product_id": 99}),
        "no node": http.post("/api/nodes/nobody/pause", json={}),
        "no action": http.post("/api/nodes/replica_1/eat", json={}),
        "primary paused": http.post("/api/nodes/primary/pause", json={}),
        "started twice": http.post("/api/nodes/primary/start", json={}),
        "too late": http.post("/api/nodes/replica_1/delay", json={"seconds": 11}),
        "no method": http.delete("/api/orders"),
    }
    expected = [400, 400, 400, 415, 400, 400, 413, 400, 409, 404, 404, 409, 409, 400, 405]
    assert dict(zip(asked, expected, strict=True)) == {
        name: answer.status_code for name, answer in asked.items()
    }
    assert DEFAULT_HEADER_NAME not in asked["no node"].headers


JSON = {"Content-Type": "application/json"}
