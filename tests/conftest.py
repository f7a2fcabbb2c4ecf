"""Settings that hold for the whole suite: Hypothesis profiles and the ``cluster`` marker."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

CLUSTER_TESTS = Path(__file__).parent / "cluster"

# A deadline for one example measures the machine more than the code, so no profile has one:
# pytest-timeout bounds every test as a whole.
settings.register_profile("default", max_examples=100, deadline=None, print_blob=True)
settings.register_profile(
    "ci",
    max_examples=400,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything under ``tests/cluster``, before ``-m`` selects by marker."""
    for item in items:
        if item.path.is_relative_to(CLUSTER_TESTS):
            item.add_marker(pytest.mark.cluster)
