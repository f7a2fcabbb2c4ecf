"""
The balance among replicas that serve a read equally well.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

from lsn_consistency._nodes import Node


class HasNode(Protocol):
    """
    Stand for whatever is chosen with a node.
    """

    @property
    def node(self) -> Node:
        """
        Return the node.
        """


_Choice = TypeVar("_Choice", bound=HasNode)


def bounds(choices: Iterable[HasNode]) -> list[float]:
    """
    Return the running sums of the nodes' weights.
    """
    return list(accumulate(each.node.weight for each in choices))


def two(
    choices: Sequence[_Choice], sums: Sequence[float], random: Callable[[], float]
) -> tuple[_Choice, _Choice]:
    """
    Draw two, which may be the same, by weight; ``sums`` are the `bounds` of ``choices``.
    """
    total, last = sums[-1], len(choices) - 1
    # A product can be rounded up to the total itself.
    first = min(bisect_right(sums, random() * total), last)
    second = min(bisect_right(sums, random() * total), last)
    return choices[first], choices[second]


def less_loaded(first: _Choice, second: _Choice) -> _Choice:
    """
    Return the one with fewer reads in flight for its weight.

    Of two that were drawn: the power of two choices (Mitzenmacher 2001).
    """
    one, other = first.node, second.node
    return second if other.in_flight / other.weight < one.in_flight / one.weight else first
