"""
Strategies on one trace over HTTP: stale reads, offload, latency, and the load on the primary.

One primary and two replicas, one of which applies commits 50 ms late. The parts are in
`tests.benchmarks.shop`.
"""

from __future__ import annotations

from typing import Final

from tests.benchmarks.findings import Bench
from tests.benchmarks.shop import picture
from tests.benchmarks.shop.judge import Outcome, percentile
from tests.benchmarks.shop.load import Loop
from tests.benchmarks.shop.picture import OURS
from tests.benchmarks.shop.stage import CONNECTIONS, READ_SECONDS, Stage, open_stage
from tests.benchmarks.shop.strategies import STRATEGIES
from tests.benchmarks.shop.trace import Shape, shape_for, sticky_offload

DELAYS: Final = {"replica_1": 0.0, "replica_2": 0.05}

# What a server can do: all its connections busy with the statement that reads.
CAPACITY: Final = CONNECTIONS / READ_SECONDS
RATES: Final[dict[Loop, float]] = {"closed": 0.5 * CAPACITY, "open": CAPACITY}
"""Requests a second: a primary that is half busy, and one that has to carry all it can."""

# An active client of a single-page application: three to four calls a second, about ten for a view
# that lasts two or three. What a sticky window leaves to replicas depends on this number alone, and
# no strategy can keep more than everything off the primary: `_think_times` shows the others.
THINK_SECONDS: Final = 0.4
THINK_TIMES: Final = (0.1, 0.2, 0.4, 0.6, 1.0, 2.0, 5.0, 10.0)
SLOW_THINK_SECONDS: Final = 1.0

SWEEP_RATE: Final = 0.5 * CAPACITY
SWEEP_STRATEGIES: Final = ("always primary", "sticky 5 s", *OURS)
# The others do not look at what a replica has: what they do at both ends they do between.
DELAYED_STRATEGIES: Final = (*OURS, "oracle")
SWEPT_DELAYS: Final = (0.0, 0.05, 0.2, 0.5, 1.0, 2.0)
SWEPT_WRITES: Final = (0.01, 0.05, 0.1, 0.2, 0.5)

SECONDS: Final = 5.0
SWEEP_SECONDS: Final = 3.5

_ABOUT: Final = (
    f"One primary, two replicas, one of them {DELAYS['replica_2'] * 1000:.0f} ms late; "
    f"{CONNECTIONS} connections a server, and a read that takes {READ_SECONDS * 1000:.0f} ms of "
    f"its server and no CPU, so that a server can do {CAPACITY:.0f} reads a second whatever the "
    "machine. Unless it says otherwise 10 % writes, each followed by a read of what it changed. "
    "Loads are the word of pg_stat_statements."
)


def run(bench: Bench) -> None:
    """
    Run the suite.
    """
    with open_stage() as stage:
        stage.delay(DELAYS)
        outcomes = {loop: _strategies(bench, stage, loop) for loop in RATES}
        _bars(bench, outcomes)
        _saturation(bench, stage)
        _think_times(bench, stage)
        if not bench.quick:
            delays = _sweep_delays(bench, stage)
            stage.delay(DELAYS)
            writes = _sweep_writes(bench, stage)
            _swept(bench, delays, writes)


def _strategies(bench: Bench, stage: Stage, loop: Loop) -> dict[str, Outcome]:
    names = ("always primary", "sticky 5 s", *OURS, "oracle") if bench.quick else STRATEGIES
    seconds = 2.0 if bench.quick else SECONDS
    shape = shape_for(RATES[loop], seconds=seconds, think_seconds=THINK_SECONDS)
    outcomes = {name: _play(bench, stage, name, shape, loop) for name in names}
    client = max(outcome.client_share for outcome in outcomes.values())
    late = max(percentile(outcome.late, 0.99) for outcome in outcomes.values())
    bench.table(
        f"{loop} loop, about {RATES[loop]:.0f} requests a second",
        picture.HEADERS,
        [picture.row(outcome) for outcome in outcomes.values()],
        f"{_ABOUT} The client took at most {client:.0%} of a core, and sent 99 % of its requests "
        f"within {late * 1000:.1f} ms of their time. lag only: dorm's router with its defaults, "
        "its query sent over an open connection and on a primary that is never idle.",
    )
    if loop == "open":
        bench.figure(
            "stale-reads-and-offload",
            "Stale reads, and reads kept off the primary, by strategy",
            picture.by_strategy(list(outcomes.values())),
        )
    return outcomes


def _play(bench: Bench, stage: Stage, name: str, shape: Shape, loop: Loop) -> Outcome:
    outcome = stage.play(name, shape, loop)
    bench.say(
        f"{name}, {loop} loop: {outcome.stale} of {outcome.reads} reads stale, "
        f"{outcome.offload:.1%} off the primary, {outcome.per_second:.0f}/s, "
        f"p50 {outcome.percentile(0.5) * 1000:.0f} ms, p99 {outcome.percentile(0.99) * 1000:.0f} ms"
    )
    return outcome


def _bars(bench: Bench, outcomes: dict[Loop, dict[str, Outcome]]) -> None:
    both = list(outcomes.values())
    everything = [each for found in both for each in found.values()]
    bench.find(
        "workload.failed",
        "requests that failed",
        sum(o.failed for o in everything),
        "requests",
        at_most=0,
    )
    controls = [found["random replica"].stale for found in both if "random replica" in found]
    if controls:
        bench.find(
            "workload.control",
            "stale reads of a random replica, which the judge has to find",
            sum(controls),
            "reads",
            at_least=1,
        )
    for name, share in zip(OURS, (0.95, 0.90), strict=True):
        key = f"workload.{name.lower()}"
        stale = sum(found[name].stale for found in both)
        bench.find(f"{key}.stale", f"stale reads at {name}", stale, "reads", at_most=0)
        bench.find(
            f"{key}.offload.oracle",
            f"offload at {name} over the oracle's",
            [found[name].offload / found["oracle"].offload for found in both],
            at_least=share,
        )
        bench.find(
            f"{key}.offload.sticky",
            f"offload at {name} over that of sticky 5 s",
            [found[name].offload / found["sticky 5 s"].offload for found in both],
            at_least=3,
        )
    backward = sum(found["CAUSAL"].backward for found in both)
    bench.find(
        "workload.causal.backward", "non-monotonic reads at CAUSAL", backward, "reads", at_most=0
    )


def _saturation(bench: Bench, stage: Stage) -> None:
    # In turns and several times: what else the machine does hits a tail before all else.
    shape = shape_for(
        RATES["open"], seconds=2.0 if bench.quick else 4.0, think_seconds=THINK_SECONDS
    )
    rounds = [
        {name: _play(bench, stage, name, shape, "open") for name in ("always primary", *OURS)}
        for _ in range(bench.rounds(3, 1))
    ]
    for name in OURS:
        bench.find(
            f"workload.{name.lower()}.p99",
            f"p99 at {name} over always primary's, at the load where the primary saturates",
            [
                found[name].percentile(0.99) / found["always primary"].percentile(0.99)
                for found in rounds
            ],
            at_most=1,
        )
    loads = [found["always primary"].loads["primary"].seconds for found in rounds]
    bench.find(
        "workload.busy_primary",
        "share of its connections' time that the primary works there, always primary",
        [load / (shape.seconds * CONNECTIONS) for load in loads],
        "",
    )


def _think_times(bench: Bench, stage: Stage) -> None:
    shapes = {
        think: shape_for(10 * CAPACITY, seconds=20.0, think_seconds=think) for think in THINK_TIMES
    }
    kept = {
        think: [sticky_offload(shape, window) for window in (5.0, 15.0)]
        for think, shape in shapes.items()
    }
    bench.table(
        "What a sticky window leaves to replicas, by think time",
        ("mean think time", "sticky 5 s", "sticky 15 s", "everything over sticky 5 s"),
        [
            [f"{think:g} s", f"{five:.1%}", f"{fifteen:.1%}", f"{1 / five:.1f} x"]
            for think, (five, fifteen) in kept.items()
        ],
        "Its rule needs no server, so this is the trace alone. The last column is the most that "
        "any strategy can reach; this library's offload does not depend on the think time here.",
    )
    names = ("sticky 5 s", *OURS)
    shape = shape_for(
        RATES["closed"], seconds=2.0 if bench.quick else 4.0, think_seconds=SLOW_THINK_SECONDS
    )
    found = {name: _play(bench, stage, name, shape, "closed") for name in names}
    for name in OURS:
        bench.find(
            f"workload.{name.lower()}.offload.sticky.slow",
            f"offload at {name} over that of sticky 5 s, {SLOW_THINK_SECONDS:g} s of think time",
            found[name].offload / found["sticky 5 s"].offload,
        )


def _sweep_delays(bench: Bench, stage: Stage) -> picture.Sweep:
    names = dict.fromkeys((*SWEEP_STRATEGIES, *DELAYED_STRATEGIES))
    found: dict[str, dict[float, Outcome]] = {name: {} for name in names}
    for delay in SWEPT_DELAYS:
        # Both are late: with one that is not, a token costs nothing.
        stage.delay(dict.fromkeys(DELAYS, delay))
        shape = shape_for(
            SWEEP_RATE,
            seconds=SWEEP_SECONDS,
            # As in the middle of a day: by 0 replicas have applied what was written since.
            warm_seconds=1.5 + delay,
            think_seconds=THINK_SECONDS,
        )
        at_end = delay in (SWEPT_DELAYS[0], SWEPT_DELAYS[-1])
        for name in names if at_end else DELAYED_STRATEGIES:
            bench.say(f"both replicas {delay:g} s late:")
            found[name][delay] = _play(bench, stage, name, shape, "open")
    bench.table(
        "Reads by apply delay of both replicas, open loop",
        ("apply delay", *picture.SWEEP_HEADERS),
        picture.sweep_rows(found, lambda delay: f"{delay:g} s"),
        f"About {SWEEP_RATE:.0f} requests a second, 10 % writes.",
    )
    bench.figure(
        "sweep-delay",
        "Reads kept off the primary and their p99, by apply delay of both replicas",
        picture.over(found, "apply delay of both replicas, s"),
    )
    return found


def _sweep_writes(bench: Bench, stage: Stage) -> picture.Sweep:
    found: dict[str, dict[float, Outcome]] = {name: {} for name in SWEEP_STRATEGIES}
    for share in SWEPT_WRITES:
        shape = shape_for(
            SWEEP_RATE, seconds=SWEEP_SECONDS, think_seconds=THINK_SECONDS, write_share=share
        )
        for name in SWEEP_STRATEGIES:
            bench.say(f"{share:.0%} writes:")
            found[name][share] = _play(bench, stage, name, shape, "open")
    bench.table(
        "Reads by share of writes, open loop",
        ("writes", *picture.SWEEP_HEADERS),
        picture.sweep_rows(found, lambda share: f"{share:.0%}"),
        f"About {SWEEP_RATE:.0f} requests a second, one replica "
        f"{DELAYS['replica_2'] * 1000:.0f} ms late.",
    )
    bench.figure(
        "sweep-writes",
        "Reads kept off the primary and their p99, by share of writes",
        picture.over(found, "writes, % of the requests", scale=100),
    )
    return found


def _swept(bench: Bench, *sweeps: picture.Sweep) -> None:
    outcomes = [each for sweep in sweeps for name in OURS for each in sweep[name].values()]
    stale = sum(outcome.stale for outcome in outcomes)
    bench.find(
        "workload.sweeps.stale", "stale reads of this library, sweeps", stale, "reads", at_most=0
    )
    backward = sum(o.backward for sweep in sweeps for o in sweep["CAUSAL"].values())
    bench.find(
        "workload.sweeps.backward",
        "non-monotonic reads at CAUSAL, sweeps",
        backward,
        "reads",
        at_most=0,
    )
