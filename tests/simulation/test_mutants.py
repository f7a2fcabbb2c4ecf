"""Every wrong change of what decides is found."""

from __future__ import annotations

import pytest

from tests.simulation.mutants import MUTANTS, Verdict, judge_all

AT_LEAST = 15


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    """What became of each mutant."""
    return {verdict.mutant.name: verdict for verdict in judge_all(MUTANTS)}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_a_mutant_is_killed(name: str, verdicts: dict[str, Verdict]) -> None:
    """The seeds, or a property test, fail with a rule of the decision taken out."""
    assert verdicts[name].killer is not None, verdicts[name].mutant.rule


def test_each_rule_has_its_mutants() -> None:
    """The list is long enough, and each mutant has a name and a rule."""
    assert len(MUTANTS) >= AT_LEAST
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.rule and mutant.old != mutant.new for mutant in MUTANTS)
