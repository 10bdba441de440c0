"""A rubric of two criteria for the tests of judges."""

import pytest

from dft.judging.rubric import Criterion, Rubric


@pytest.fixture
def rubric() -> Rubric:
    """Two criteria, of which the first weighs three times as much."""
    scale = ("awful", "bad", "fair", "good", "perfect")
    return Rubric((Criterion("right", 3.0, "Is it right?", scale), Criterion("brief", 1.0, "Is it brief?", scale)))
