"""A run that goes on with two processes, and then with one again, learns what one process alone learns."""

import pytest

from scripts.reshape_checkpoint import main as reshape
from tests.helpers import read_log

pytestmark = pytest.mark.launch

# a rate and a decay at which a count of steps or a setting that is wrong shows
FLAGS = ("--max_steps", 6, "--save_steps", 2, "--validation_split_percentage", 0)
FLAGS += ("--learning_rate", 3e-2, "--weight_decay", 0.5)
STEPS = (3, 5)  # the first ones of the runs that go on


@pytest.fixture(scope="module")
def losses(train_in, tmp_path_factory) -> list[dict[int, float]]:
    """By step: of an uninterrupted run, of one that goes on from its step 2, and of one from the latter's step 4."""
    runs = [tmp_path_factory.mktemp(name) for name in ("one", "two", "one_again")]

    def reshaped(number: int, step: int) -> str:
        checkpoint = runs[number] / "out" / f"checkpoint-{step}"
        reshape([str(checkpoint)])
        return f"{checkpoint}-reshaped"

    on_one = (*FLAGS, "--deepspeed", "ds_config/zero2.json", "--gradient_accumulation_steps", 2)
    train_in(runs[0], *on_one)
    train_in(runs[1], *FLAGS, "--resume_from_checkpoint", reshaped(0, 2), LAUNCHER="torchrun")  # under ZeRO-3
    train_in(runs[2], *on_one, "--resume_from_checkpoint", reshaped(1, 4))
    logs = [read_log(run / "out") for run in runs]
    return [{record["step"]: record["ce_loss"] for record in log if "ce_loss" in record} for log in logs]


def test_losses_are_those_of_the_run_that_nothing_has_hit(losses):
    alone, *resumed = losses
    for found, first in zip(resumed, STEPS, strict=True):
        steps = range(first, 7)
        assert [found[step] for step in steps] == pytest.approx([alone[step] for step in steps], abs=1e-4)
