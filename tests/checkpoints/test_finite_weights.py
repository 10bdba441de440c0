"""Weights that are NaN or infinite are never saved, neither in a checkpoint nor at the end."""

import pytest
import torch
from transformers import TrainerCallback

from dft.checkpoints.finite_weights import check_finite


class Spoil(TrainerCallback):
    """Makes a weight NaN after the second step, as an update may."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")


@pytest.mark.parametrize(("save_strategy", "saved"), [("steps", ["checkpoint-1"]), ("no", [])])
def test_a_run_ends_with_what_it_saved_before(make_trainer, tmp_path, save_strategy, saved):
    trainer = make_trainer(save_strategy=save_strategy, save_steps=1)
    trainer.add_callback(Spoil())
    with pytest.raises(FloatingPointError, match=r"after step 2: .*up_proj\.weight\. They are not saved"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == saved


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_among_many_is_found(value, dtype):
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(5))).to(dtype)
    check_finite(model, 1)
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight[3, i] = value
    with pytest.raises(FloatingPointError, match=r"0\.weight, 1\.weight, 2\.weight and 2 more"):
        check_finite(model, 1)


def test_great_numbers_are_finite():
    model = torch.nn.Linear(64, 64).to(torch.float16)
    with torch.no_grad():
        model.weight.fill_(torch.finfo(torch.float16).max)  # their sum isn't
    check_finite(model, 1)


def test_weights_that_are_not_trained_are_left_alone():
    """In 4 bits they are stored as float32, whose bits mean something else."""
    model = torch.nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    model.weight.requires_grad_(False)
    check_finite(model, 1)
