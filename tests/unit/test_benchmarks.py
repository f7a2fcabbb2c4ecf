"""The harness of the benchmarks: ratios, bars, baselines, the report and the exit status."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import baseline, report
from tests.benchmarks.__main__ import INTERRUPTED, MISSED, USAGE, main
from tests.benchmarks.baseline import BaselineError
from tests.benchmarks.findings import Bench, Finding, Sense, describe
from tests.benchmarks.measuring import Comparison, Series, compare, compare_async, quartiles
from tests.benchmarks.report import Outcome
from tests.benchmarks.suites import Suite


def comparison(**rounds: Sequence[float]) -> Comparison:
    return Comparison("some", {name: Series(name, tuple(each)) for name, each in rounds.items()})


def finding(
    value: float,
    bar: float | None = None,
    sense: Sense = "at most",
    *,
    key: str = "key",
    unit: str = "x",
    floor: str = "",
) -> Finding:
    return Finding("suite", key, "some title", value, unit, None, bar, sense, floor)


# Comparing


def test_a_ratio_is_taken_within_each_round() -> None:
    """A slow round slows both ways and leaves its ratio as it is."""
    compared = comparison(ours=[2.0, 20.0], theirs=[4.0, 40.0])
    assert [0.5, 0.5] == compared.ratios("ours", "theirs")


def test_what_both_contain_is_taken_off_both() -> None:
    """With ``minus``, the ratio is that of what each adds to it."""
    compared = comparison(ours=[3.0, 5.0], theirs=[5.0, 8.0], bare=[1.0, 2.0])
    assert [0.5, 0.5] == compared.ratios("ours", "theirs", minus="bare")
    assert [2.0, 3.0] == compared.extras("ours", "bare")


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3.0, 3.0)), ([1.0, 2.0, 3.0], (1.5, 2.5)), ([5.0, 1.0, 3.0, 2.0, 4.0], (2.0, 4.0))],
)
def test_quartiles(values: list[float], expected: tuple[float, float]) -> None:
    """The quartiles include the extremes; of one value they are that value."""
    assert expected == quartiles(values)


def test_ways_take_turns_in_changing_order() -> None:
    """No way always comes after the same other one."""
    turns: list[str] = []
    ticks = iter(range(1000))
    compared = compare(
        "some",
        {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")},
        rounds=3,
        clock=lambda: float(next(ticks)),
    )
    assert ["a", "b", "b", "a", "a", "b"] == turns[-6:]
    assert (1.0, 1.0, 1.0) == compared.series["a"].rounds


def test_what_ran_before_does_not_count_in_an_async_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first calls after another way are slower; a turn counts those that come after them."""
    now, ran = 0.0, ""
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def way(name: str) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            nonlocal now, ran
            now += 1.0 if ran == name else 10.0
            ran = name

        return run

    ways = {name: way(name) for name in ("ours", "theirs")}
    compared = asyncio.run(compare_async("some", ways, rounds=4, number=4))
    assert [(1.0,) * 4] * 2 == [series.rounds for series in compared.series.values()]


# Findings


@pytest.mark.parametrize(
    ("value", "bar", "sense", "expected"),
    [
        (1.0, 1.0, "at most", True),
        (1.01, 1.0, "at most", False),
        (1.0, 1.0, "at least", True),
        (0.99, 1.0, "at least", False),
        (99.0, None, "at most", True),
        (float("nan"), 1.0, "at most", False),
        (float("nan"), 1.0, "at least", False),
    ],
)
def test_bars(value: float, bar: float | None, sense: Sense, expected: bool) -> None:
    """A bar includes its own value; no bar is always met, and no number never meets one."""
    assert expected is finding(value, bar, sense).met


def test_a_finding_is_the_median_of_its_rounds() -> None:
    """It keeps the quartiles, the sense of its bar, and is told at once."""
    told: list[str] = []
    bench = Bench(say=told.append, suite="reads")
    found = bench.find("reads.alone", "alone", [3.0, 1.0, 2.0], at_least=2.5)
    assert (2.0, (1.5, 2.5)) == (found.value, found.spread)
    assert ("reads", "at least", False) == (found.suite, found.sense, found.met)
    assert ["alone: 2 x (1.5 to 2.5), at least 2.5: MISSED"] == told
    assert "some title: 2 x" == describe(finding(2.0))


# Baselines


@pytest.mark.parametrize(
    ("before", "now", "sense", "regressed"),
    [
        (1.0, 1.5, "at most", False),
        (1.0, 1.51, "at most", True),
        (1.0, 0.1, "at most", False),
        (0.9, 0.6, "at least", False),
        (0.9, 0.59, "at least", True),
        (0.9, 9.0, "at least", False),
        (1.0, float("nan"), "at most", True),
        (1.0, float("nan"), "at least", True),
    ],
)
def test_worse_by_more_than_half_is_a_regression(
    before: float, now: float, sense: Sense, regressed: bool
) -> None:
    """Half as much again is the most that passes, in the direction that is worse."""
    found = baseline.regressions([finding(now, 5.0, sense)], {"key": before})
    assert regressed is bool(found)


def test_a_baseline_of_nothing_regresses_with_its_bar() -> None:
    """Where there was nothing, as with stale reads, no factor applies: the bar does."""
    assert [] == baseline.regressions([finding(0.0, 0.0)], {"key": 0.0})
    assert [] == baseline.regressions([finding(3.0, 1000.0)], {"key": 0.0})
    assert [] == baseline.regressions([finding(3.0, 1000.0)], {"key": -2.0})
    assert baseline.regressions([finding(1.0, 0.0)], {"key": 0.0})


def test_only_what_was_measured_and_known_is_compared() -> None:
    """Keys of other suites, and keys that are new, are left alone."""
    findings = [finding(9.0, key="new"), finding(1.0, key="same")]
    assert [] == baseline.regressions(findings, {"same": 1.0, "other": 1.0})


def test_a_regression_says_what_it_is() -> None:
    """Key, value, limit and baseline are told."""
    (regression,) = baseline.regressions([finding(3.0, 1.0)], {"key": 1.0})
    assert "key: 3 x, more than 1.5; the baseline is 1 (some title)" == str(regression)
    (regression,) = baseline.regressions([finding(0.5, 1.0, "at least")], {"key": 1.0})
    assert "key: 0.5 x, less than 0.667; the baseline is 1 (some title)" == str(regression)


def test_a_baseline_keeps_what_was_not_measured(tmp_path: Path) -> None:
    """Times are not written, as they say nothing about another machine."""
    path = tmp_path / "folder" / "baseline.json"
    baseline.write(path, [finding(1.23456, key="a"), finding(7.0, key="b", unit="us")])
    baseline.write(path, [finding(2.0, key="c", unit="KiB"), finding(3.0, key="d", unit="ms")])
    assert {"a": 1.235, "c": 2.0} == baseline.read(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[1]", "holds no object"),
        ('{"a": "1"}', "the value of 'a' is no number"),
        ('{"a": true}', "the value of 'a' is no number"),
        ('{"a": NaN}', "the value of 'a' is not finite"),
    ],
)
def test_a_file_that_is_no_baseline(tmp_path: Path, text: str | None, expected: str) -> None:
    """It is refused, and the reason names the key."""
    path = tmp_path / "baseline.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BaselineError, match=expected):
        baseline.read(path)


# The command


@dataclass(frozen=True)
class FakeSuite(Suite):
    """Be a suite without a module."""

    body: Callable[[Bench], None]

    def load(self) -> Callable[[Bench], None]:
        return self.body


def suite(
    name: str, body: Callable[[Bench], None] | float = 1.0, *, quick: bool = True
) -> FakeSuite:
    """Make a suite of a body, or of the value that it finds, with a bar of 2."""

    def find(bench: Bench) -> None:
        assert isinstance(body, float)
        bench.find(f"{name}.key", f"what {name} finds", body, at_most=2.0, floor="a wall")

    return FakeSuite(name, f"about {name}", quick, find if isinstance(body, float) else body)


def raising(error: BaseException) -> Callable[[Bench], None]:
    def body(bench: Bench) -> None:
        raise error

    return body


class Runs:
    """Run the command on fake suites, and read its report."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, suites: Sequence[Suite], *arguments: object) -> int:
        return main([*map(str, arguments), "--out", str(self.folder)], suites, lambda: 0.0)

    @property
    def json(self) -> Any:
        return json.loads((self.folder / "report.json").read_text())

    @property
    def markdown(self) -> str:
        return (self.folder / "report.md").read_text()

    @property
    def keys(self) -> list[str]:
        return [each["key"] for each in self.json["findings"]]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """The command, with a folder for its report."""
    return Runs(tmp_path / "out")


def test_the_status_tells_whether_the_bars_are_met(runs: Runs) -> None:
    """One that is missed is enough for 1, and its floor is told."""
    assert 0 == runs([suite("a"), suite("b")])
    assert MISSED == runs([suite("a"), suite("b", 3.0)])
    assert "| **missed** | a wall |" in runs.markdown


def test_against_a_baseline_only_regressions_fail(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missed bar is shown and does not fail; what is worse by more than half does."""
    path = tmp_path / "baseline.json"
    path.write_text('{"a.key": 2.5, "other.key": 1}')
    assert 0 == runs([suite("a", 3.0)], "--baseline", path)
    assert "MISSED" in capsys.readouterr().out
    assert MISSED == runs([suite("a", 4.0)], "--quick", "--baseline", path)
    assert "REGRESSION a.key: 4 x, more than 3.75" in capsys.readouterr().out
    assert [{"key": "a.key", "value": 4.0, "baseline": 2.5}] == runs.json["regressions"]


def test_a_baseline_is_written_and_read_back(runs: Runs, tmp_path: Path) -> None:
    """The same run regresses nowhere against its own baseline."""
    path = tmp_path / "baseline.json"
    assert MISSED == runs([suite("a", 3.0)], "--write-baseline", path)
    assert {"a.key": 3.0} == baseline.read(path)
    assert 0 == runs([suite("a", 3.0)], "--baseline", path)


def test_a_suite_that_raises_leaves_the_others_their_results(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on, the report says what happened, and the status is 1."""

    def half(bench: Bench) -> None:
        bench.find("half.key", "found before", 1.0)
        raise ValueError("the server is gone")

    assert MISSED == runs([suite("a"), suite("half", half), suite("b")])
    assert ["a.key", "half.key", "b.key"] == runs.keys
    assert {"half": "ValueError: the server is gone"} == runs.json["failures"]
    assert "`half` ended early: ValueError: the server is gone" in runs.markdown
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_peer_says_what_to_install(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status is 2, and suites that need no peers have run."""
    missing = ModuleNotFoundError("No module named 'dorm'", name="dorm.contrib")
    assert USAGE == runs([suite("a", raising(missing)), suite("b")])
    assert "dorm is not installed: pip install -e '.[bench]'" in capsys.readouterr().out
    assert ["b.key"] == runs.keys


def test_a_module_of_this_project_that_is_missing_is_a_failure(runs: Runs) -> None:
    """No extra would bring it."""
    missing = ModuleNotFoundError("No module named 'tests.no'", name="tests.no")
    assert MISSED == runs([suite("a", raising(missing))])


def test_an_interrupted_run_keeps_what_it_has(runs: Runs) -> None:
    """Ctrl-C ends the run, not the report."""
    stopped = suite("b", raising(KeyboardInterrupt()))
    assert INTERRUPTED == runs([suite("a"), stopped, suite("c")])
    assert ["a.key"] == runs.keys
    assert "interrupted" in runs.markdown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["a", "b", "c"]),
        (["--quick"], ["a", "c"]),
        (["b"], ["b"]),
        (["c", "b", "--quick"], ["b", "c"]),
    ],
)
def test_which_suites_run(runs: Runs, arguments: list[str], expected: list[str]) -> None:
    """All, the quick ones, or those that are named, in their own order."""
    seen: list[tuple[str, bool]] = []
    suites = [
        suite(name, lambda bench: seen.append((bench.suite, bench.quick)), quick=name != "b")
        for name in "abc"
    ]
    assert 0 == runs(suites, *arguments)
    assert [(name, "--quick" in arguments) for name in expected] == seen


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing"], "no suite is named 'nothing'; there are a"),
        (["--baseline", "/nowhere/baseline.json"], "cannot be read"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command(
    runs: Runs, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs nothing, says why, and its status is 2."""
    with pytest.raises(SystemExit) as ended:
        runs([suite("a", raising(AssertionError()))], *arguments)
    assert USAGE == ended.value.code
    assert expected in capsys.readouterr().err


def test_a_broken_baseline_is_not_written_to(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is said before anything is measured, and the file stays as it is."""
    path = tmp_path / "baseline.json"
    path.write_text("{")
    with pytest.raises(SystemExit) as ended:
        runs([suite("a", raising(AssertionError()))], "--write-baseline", path)
    assert USAGE == ended.value.code
    assert "is not JSON" in capsys.readouterr().err
    assert "{" == path.read_text()


def test_progress_goes_to_stderr(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line tells the time since the start and the suite."""
    runs([suite("a", lambda bench: bench.say("half way"))])
    assert "[    0.0 s] a: half way\n" in capsys.readouterr().err


# The report


def test_plots_are_left_out_without_matplotlib(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is named, everything else is written, and nothing fails."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    def body(bench: Bench) -> None:
        bench.find("a.key", "found", 1.0)
        bench.figure("curve", "A curve", lambda figure, axes: None)

    assert 0 == runs([suite("a", body)])
    assert "no plots: plots need matplotlib: pip install" in capsys.readouterr().err
    assert "curve.svg" not in runs.markdown
    assert ["a.key"] == runs.keys


def test_the_markdown_of_a_run() -> None:
    """Bars come first, then what each suite found beside them; empty suites are left out."""
    bench = Bench(say=lambda text: None, suite="reads")
    bench.find("reads.a", "with | a bar", [1.0, 2.0, 3.0], at_most=2.0, floor="not shown: met")
    bench.find("reads.b", "without", 12345.0, "us")
    bench.add(comparison(ours=[1e-6, 2e-6, 3e-6], theirs=[4e-3, 4e-3, 4e-3]))
    bench.table("Rows", ["name", "ns"], [["a", "1.5"]], note="A note.")
    bench.figure("curve", "A curve", lambda figure, axes: None)
    text = report.as_markdown(bench, Outcome(suites={"reads": "what reads cost", "none": "empty"}))
    assert "| reads | with \\| a bar | 2 x | 1.5 to 2.5 | at most 2 x | met |  |" in text
    assert 1 == text.count("a bar |")
    assert "| without | 12,345 us |  |" in text
    assert "| name | ns |\n| --- | ---: |\n| a | 1.5 |" in text
    assert "| ours | 2 us | 1.5 us to 2.5 us | 3 |\n| theirs | 4 ms | 4 ms to 4 ms | 3 |" in text
    assert "A note." in text
    assert "![A curve](curve.svg)" in text
    assert text.index("## Bars") < text.index("## reads: what reads cost")
    assert "empty" not in text
    assert "Regressions" not in text


def test_the_json_of_a_run_holds_every_round() -> None:
    """Programs get the rounds, not only their median."""
    bench = Bench(say=lambda text: None, suite="reads", data={"postgresql": "18.1"})
    bench.add(comparison(ours=[1.0, 2.0]))
    bench.find("reads.a", "some", 1.0, at_least=2.0)
    held = report.as_json(bench, Outcome(suites={"reads": "about"}, seconds={"reads": 1.5}))
    assert {"ours": [1.0, 2.0]} == held["comparisons"][0]["seconds_per_call"]
    assert "18.1" == held["machine"]["postgresql"]
    assert {"starlette", "psycopg"} <= held["machine"]["versions"].keys()
    found = held["findings"][0]
    assert ("at least", 2.0, False) == (found["sense"], found["bar"], found["met"])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(2.0, "2 s"), (0.01234, "12.3 ms"), (1.5e-6, "1.5 us"), (2e-11, "0.02 ns"), (-2e-3, "-2 ms")],
)
def test_times_are_shown_in_the_unit_that_suits_them(seconds: float, expected: str) -> None:
    """Three digits that mean something."""
    assert expected == report.duration(seconds)
