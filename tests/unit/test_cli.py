"""The command line and the parts of the demo that need no server."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

import lsn_consistency
from lsn_consistency import Reason, Route, Token, __version__, events
from lsn_consistency.cli import main
from lsn_consistency.demo import check
from lsn_consistency.demo.journal import KEPT_ENTRIES, Journal, describe
from lsn_consistency.demo.tally import Sample, Tally, make_table, objections, percentile, total
from lsn_consistency.exceptions import MalformedTokenError
from lsn_consistency.lsn import Lsn, Position

ROOT = Path(next(iter(lsn_consistency.__path__))).parent


def status_of(arguments: Sequence[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


# The command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """``--version`` prints the package's version and ends with 0."""
    assert 0 == status_of(["--version"])
    assert f"lsn-consistency {__version__}\n" == capsys.readouterr().out


def test_help_names_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` names the subcommand."""
    assert 0 == status_of(["--help"])
    assert re.search(r"^ +demo +serve a small shop", capsys.readouterr().out, re.MULTILINE)


def test_help_of_the_demo_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    """``demo --help`` explains every option and the exit status."""
    assert 0 == status_of(["demo", "--help"])
    told = capsys.readouterr().out
    options = {"--port", "--open", "--secret-key", "--apply-delay", "--bindir", "--check"}
    assert {*options, "--reads", "--help"} == set(
        re.findall(r"^  (?:-h, )?(--[a-z-]+)", told, re.M)
    )
    assert "exit status:" in told


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--host", "0.0.0.0"], "unrecognized arguments: --host 0.0.0.0"),
        (["demo", "--port", "65536"], "'65536' is no port: a number from 0 to 65535"),
        (["demo", "--port", "-1"], "'-1' is no port"),
        (["demo", "--port", "²"], "'²' is no port"),
        (["demo", "--apply-delay", "-0.1"], "'-0.1' is no number of seconds from 0 to 10"),
        (["demo", "--apply-delay", "nan"], "'nan' is no number of seconds"),
        (["demo", "--apply-delay", "soon"], "'soon' is no number of seconds"),
        (["demo", "--check", "--reads", "0"], "'0' is no number from 1 to 100000"),
    ],
)
def test_wrong_usage(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong usage ends with 2 and says what is wrong."""
    assert 2 == status_of(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("name", ["httpx", "rich", "uvicorn"])
def test_a_missing_package_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the extra the command ends with 2 and says how to get it."""
    monkeypatch.setitem(sys.modules, name, None)
    assert 2 == main(["demo"])
    told = f'lsn-consistency: the demo needs {name}: pip install "lsn-consistency[demo]"\n'
    assert ("", told) == capsys.readouterr()


def test_a_port_in_use_is_told_before_anything_is_started(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A port that somebody listens on ends with 2, a message, and no server started."""
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        assert 2 == main(["demo", "--port", str(port)])
    out, err = capsys.readouterr()
    assert "" == out
    assert f"port {port} of 127.0.0.1 cannot be used" in err
    assert "--port 0" in err


def test_an_empty_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A key that signs nothing ends with 2 before anything is started."""
    assert 2 == main(["demo", "--port", "0", "--secret-key", " "])
    out, err = capsys.readouterr()
    assert "" == out
    assert "secret_key is empty" in err


def test_a_folder_without_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without PostgreSQL ends with 2 and says how to get it."""
    assert 2 == main(["demo", "--port", "0", "--bindir", str(tmp_path)])
    assert 'pip install "lsn-consistency[demo]"' in capsys.readouterr().err


def test_the_handler_of_sigterm_is_put_back() -> None:
    """A program that calls `main` keeps its own handler."""
    before = signal.getsignal(signal.SIGTERM)
    main(["demo", "--secret-key", ""])
    assert before == signal.getsignal(signal.SIGTERM)


def test_it_runs_as_a_module() -> None:
    """``python -m lsn_consistency`` is the same command."""
    command = [sys.executable, "-m", "lsn_consistency", "--version"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (0, f"lsn-consistency {__version__}\n") == (told.returncode, told.stdout)


# The verdict

SERVED = Sample("replica_1", "replica_1", 1.5, False, True)


def tallied(*samples: Sample) -> Tally:
    tally = Tally("phase")
    for sample in samples:
        tally.add(sample)
    return tally


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        ([SERVED], None),
        ([SERVED, Sample("primary", "primary", 0, False, None)], None),
        ([SERVED, Sample("replica_1", "replica_1", 0, True, False)], "1 reads with a token"),
        ([SERVED, Sample("replica_2", "replica_1", 0, False, False)], "1 reads were not served"),
        ([Sample("primary", "primary", 0, False, True)], "no read was served by a replica"),
        ([Sample("replica_1", "replica_1", 0, False, False)], "no read without a token was stale"),
        ([Sample("replica_1", "replica_1", 0, False, None)], "no read without a token was stale"),
    ],
)
def test_the_verdict(samples: list[Sample], complaint: str | None) -> None:
    """The check passes only if nothing was stale, and the scenario could have shown it."""
    reasons = objections([tallied(*samples), Tally("empty")])
    expected = [] if complaint is None else [True]
    assert expected == [reason.startswith(str(complaint)) for reason in reasons]


def test_nothing_read_proves_nothing() -> None:
    """A scenario without a read does not pass."""
    assert 2 == len(objections([]))


def test_phases_are_added_up() -> None:
    """The last line of the table is the sum of the others."""
    one = tallied(SERVED, Sample("primary", "primary", 9.0, True, None))
    both = total([one, tallied(SERVED)])
    counted = (both.reads, both.by_replica, both.by_primary, both.stale)
    assert (3, 2, 1, 1) == counted
    assert (2, 2, 0, [1.5, 9.0, 1.5]) == (
        both.twin_reads,
        both.twin_stale,
        both.misplaced,
        both.waits_ms,
    )


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, None), ([3.0], 0.99, 3.0), ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0), ([1, 2], 0.99, 2)],
)
def test_percentile(values: list[float], share: float, expected: float | None) -> None:
    """The nearest-rank percentile is one of the values."""
    assert expected == percentile(values, share)


def test_the_table_fits_into_80_columns() -> None:
    """No cell is cut off on a terminal of 80 columns."""
    tallies = [Tally(step.title, reads=99_999, by_primary=1) for step in check.steps_of(10.0)]
    for tally in tallies:
        tally.waits_ms = [1000.0]
    shown = StringIO()
    Console(width=80, file=shown).print(make_table(tallies))
    lines = shown.getvalue().splitlines()
    starts = [line for line in lines for tally in tallies if line.startswith(f"{tally.title} ")]
    assert (False, len(tallies)) == ("…" in shown.getvalue(), len(starts))


@pytest.mark.parametrize(("wanted", "made"), [(1, 80), (80, 80), (150, 160), (400, 400)])
def test_the_check_makes_about_as_many_reads_as_asked(wanted: int, made: int) -> None:
    """The number of reads is rounded to whole rounds of all clients, at least one."""
    assert made == check.number_of_reads(wanted)


def test_the_scenario_has_a_late_replica_however_short_the_delay() -> None:
    """A delay of 0 would prove nothing: the check lengthens it."""
    assert len(check.steps_of(0)) == check.PHASES
    assert (("replica_2/delay", 0.1),) == check.steps_of(0)[0].actions
    assert (("replica_2/delay", 0.4),) == check.steps_of(0.4)[0].actions


# The journal

EVENTS: dict[events.Event, str | None] = {
    events.ReadRouted(Route("primary", "primary", Reason.NO_REPLICA)): None,
    events.TokenRejected(MalformedTokenError("no"), "cookie"): "the cookie was refused: no",
    events.TokenNotSent(Token()): "after the response had started",
    events.PositionUnknown("gone", 1.0): "pinned to the primary: gone",
    events.LostWrite(Position(7, 1, Lsn(0x3000100)), 2, None): "0/3000100 of timeline 1 may be",
    events.NodeFailed("eu", "refused\nagain", 1): "eu fails (refused)",
    events.NodeFailed("eu", "refused", 3): "eu fails (refused): its breaker opens",
    events.NodeFailed("eu", "refused", 4): None,
    events.NodeRecovered("eu"): "eu answers again",
    events.RoleChanged("eu", None, "replica"): "eu was seen as replica",
    events.RoleChanged("eu", "replica", "primary"): "seen as primary, before as replica",
    events.ReadRetried("eu", "40001", "conflict"): "failed on eu and runs elsewhere: conflict",
    events.ReadHedged("eu", "us", True): "eu was slow, so us was asked too: us was first",
    events.FallbackLimited(5, "wait"): "serves 5 fallback reads",
}


def test_every_event_has_words() -> None:
    """The page tells each kind of event, apart from reads and repeated failures."""
    lag = events.LagExceeded(2.0, {"eu": 3.0})
    assert "lags for more than 2 s" in (describe(lag) or "")
    kinds = {type(event) for event in EVENTS} | {type(lag)}
    assert set(get_args(events.Event)) == kinds
    for event, expected in EVENTS.items():
        told = describe(event)
        assert (expected is None) == (told is None)
        assert expected is None or expected in (told or "")


def test_the_journal_is_bounded_and_tells_what_is_new() -> None:
    """Old entries fall out; their numbers go on, so that a page can ask for the rest."""
    journal = Journal()
    for number in range(KEPT_ENTRIES + 5):
        journal.add("Order", str(number))
    kept = journal.since(0)
    assert (KEPT_ENTRIES, "5", 6) == (len(kept), kept[0]["text"], kept[0]["number"])
    assert [str(KEPT_ENTRIES + 4)] == [entry["text"] for entry in journal.since(KEPT_ENTRIES + 4)]
    assert [] == journal.since(KEPT_ENTRIES + 5)
