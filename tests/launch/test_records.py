"""Records of training and evaluation equal a recomputation over the saved models, on one process and on two."""

import json
import math
from collections.abc import Callable

import pytest

from tests.helpers import run_on

pytestmark = pytest.mark.launch

# names of metrics in training records, where they are others than in evaluation
TRAINING_NAMES = {"avg_p_correct": "train/avg_p_correct", "acc": "token_accuracy"}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Callable[[int, str], dict]:
    """Gives the records of a case on so many processes, and what they should be; one launch serves all cases."""
    directories = {}

    def of(processes: int, case: str) -> dict:
        if processes not in directories:
            directories[processes] = tmp_path_factory.mktemp("records")
            run_on(processes, "tests/launch/metrics_worker.py", directories[processes])
        return json.loads((directories[processes] / f"{case}.json").read_text())

    return of


def worst(result: dict) -> float:
    """The greatest relative difference between what was recorded and what was recomputed."""
    expected = {TRAINING_NAMES.get(k, k): v for k, v in result["expected_train"].items()}
    pairs = [(result["train"].get(key, math.inf), value) for key, value in expected.items()]
    pairs += [(result["eval"].get(f"eval_{key}", math.inf), value) for key, value in result["expected_eval"].items()]
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("cut", ["1 micro-batch", "8 micro-batches"])
@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("processes", [1, 2])
def test_records_equal_a_recomputation_over_the_saved_model(records, processes, batching, cut):
    result = records(processes, f"{batching}, {cut}")
    expected = result["expected_train"]
    assert {key for key in expected if key.startswith("channel/rare")}
    assert 0 < expected["p_below_0.01"] < 1 > expected["p_above_0.99"] > 0
    print(f"greatest difference {worst(result):.1e}")
    assert worst(result) < 1e-5


@pytest.mark.parametrize(
    ("processes", "mutant"), [(1, "the last micro-batch"), (2, "the last micro-batch"), (2, "rank 0 alone")]
)
def test_the_recomputation_rejects_sums_of_less(records, processes, mutant):
    assert worst(records(processes, f"mutant of {mutant}")) > 1e-3
