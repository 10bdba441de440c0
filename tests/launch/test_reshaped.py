"""A run that loses one of its two processes and gets it back loses nothing of what it has learned."""

import pytest

from scripts.reshape_checkpoint import main as reshape
from tests.helpers import read_log

pytestmark = pytest.mark.launch

# A rate and a decay at which a count of steps or a setting that is wrong shows; both depend on the length of the run.
FLAGS = ("--max_steps", 6, "--save_steps", 2, "--validation_split_percentage", 0)
FLAGS += ("--learning_rate", 3e-2, "--weight_decay", 0.5)
STEPS = ((1, 2, 3, 4, 5, 6), (3, 4, 5, 6), (5, 6))  # that each run trains


@pytest.fixture(scope="module")
def losses(train_in, tmp_path_factory) -> list[dict[int, float]]:
    """By step: of an uninterrupted run, of one that goes on from its step 2, and of one from the latter's step 4."""
    runs = [tmp_path_factory.mktemp(name) for name in ("two", "one", "two_again")]

    def reshaped(number: int, step: int) -> str:
        checkpoint = runs[number] / "out" / f"checkpoint-{step}"
        reshape([str(checkpoint)])
        return f"{checkpoint}-reshaped"

    on_two = {"LAUNCHER": "torchrun", "NPROC": "2"}  # under ZeRO-3
    train_in(runs[0], *FLAGS, **on_two)
    on_one = ("--deepspeed", "ds_config/zero2.json", "--gradient_accumulation_steps", 2)
    train_in(runs[1], *FLAGS, *on_one, "--resume_from_checkpoint", reshaped(0, 2))
    train_in(runs[2], *FLAGS, "--resume_from_checkpoint", reshaped(1, 4), **on_two)
    logs = [read_log(run / "out") for run in runs]
    return [{record["step"]: record["ce_loss"] for record in log if "ce_loss" in record} for log in logs]


def test_losses_are_those_of_the_run_that_nothing_has_hit(losses):
    """Two processes train under ZeRO-3, the one under ZeRO-2."""
    for found, steps in zip(losses, STEPS, strict=True):
        assert [found[step] for step in steps] == pytest.approx([losses[0][step] for step in steps], abs=1e-4)
