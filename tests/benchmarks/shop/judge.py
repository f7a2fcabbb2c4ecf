"""
What a run says: how many reads were stale, who answered them, how long all of it took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lsn_consistency.testing import Operation, check
from tests.benchmarks.shop.load import Sample


@dataclass(frozen=True, slots=True)
class Load:
    """
    What pg_stat_statements says of one server: statements, their seconds, reads and writes.
    """

    calls: int
    seconds: float
    reads: int
    writes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    Hold what one run of a trace gave; latencies are seconds.

    ``stale`` reads miss a write of their own session, ``backward`` ones what their session had
    seen before. ``excepted`` is the documented exception among these: what a replica has shown
    is missing on the primary while its commit is still being completed there.
    """

    strategy: str
    reads: int
    writes: int
    failed: int
    stale: int
    backward: int
    excepted: int
    per_second: float
    latencies: tuple[float, ...]
    read_latencies: tuple[float, ...]
    late: tuple[float, ...]
    client_share: float
    loads: dict[str, Load]

    @property
    def offload(self) -> float:
        """
        Return the share of the reads that the primary did not get, by the servers' own count.
        """
        return 1 - self.loads["primary"].reads / max(1, sum(x.reads for x in self.loads.values()))

    @property
    def stale_share(self) -> float:
        """
        Return the share of the reads that were stale.
        """
        return self.stale / max(1, self.reads)

    @property
    def primary_ms(self) -> float:
        """
        Return the milliseconds of the primary that a request took, whoever it was sent to.
        """
        return self.loads["primary"].seconds * 1000 / self._requests

    @property
    def primary_calls(self) -> float:
        """
        Return how many statements the primary got for a request.
        """
        return self.loads["primary"].calls / self._requests

    @property
    def _requests(self) -> int:
        # By the servers' own count too: when the clients stop, some requests are under way.
        return max(1, sum(load.reads + load.writes for load in self.loads.values()))

    def percentile(self, share: float) -> float:
        """
        Return the latency in seconds that a share of all requests stayed under.
        """
        return percentile(self.latencies, share)


def percentile(values: Sequence[float], share: float) -> float:
    """
    Return the value that a share of the values is at most; 0.0 of none.
    """
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def judge(
    strategy: str,
    samples: Sequence[Sample],
    seconds: float,
    client_share: float,
    loads: dict[str, Load],
) -> Outcome:
    """
    Judge a run by what its clients recorded; calls from before 0 are known and not counted.
    """
    report = check(_operation(sample) for sample in samples)
    counted = [sample for sample in samples if 0 <= sample.due < seconds]
    answered = [sample for sample in counted if sample.body]
    by_rule = {
        rule: sum(found.rule == rule and found.read.began >= 0 for found in report.violations)
        for rule in ("read_your_writes", "monotonic_reads")
    }
    return Outcome(
        strategy=strategy,
        reads=sum(not sample.write for sample in answered),
        writes=sum(sample.write for sample in answered),
        failed=len(counted) - len(answered),
        stale=by_rule["read_your_writes"],
        backward=by_rule["monotonic_reads"],
        excepted=sum(found.read.began >= 0 for found in report.exceptions),
        per_second=len(answered) / seconds,
        # From when a request was due: one that is sent late because others are slow is slow too.
        latencies=tuple(sample.ended - sample.due for sample in answered),
        read_latencies=tuple(s.ended - s.due for s in answered if not s.write),
        late=tuple(sample.began - sample.due for sample in counted),
        client_share=client_share,
        loads=loads,
    )


def _operation(sample: Sample) -> Operation:
    role, _, shown = sample.body.partition(" ")
    is_write = sample.write
    values = {sample.number} if is_write else set(map(int, filter(None, shown.split(","))))
    return Operation(
        client=str(sample.session),
        kind="write" if is_write else "read",
        began=sample.began,
        ended=sample.ended,
        values={sample.key: frozenset(values)},
        outcome="ok" if sample.body else "unknown" if is_write else "failed",
        role="primary" if is_write or role == "primary" else "replica",
    )
