"""Weights are saved as they were trained, however they are evaluated."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from dft.tracking.results import save_run
from examples.make_tiny_model import make_model
from tests.helpers import flat_weights

FULL = [{"bf16_full_eval": True}, {"fp16_full_eval": True}]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


class Evaluated(TrainerCallback):
    """Notes the type of the weights in evaluations."""

    def __init__(self):
        self.types = []

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.types.append(model.dtype)


@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_saves_what_it_has_trained(make_trainer, tmp_path, full, dtype):
    """Its last evaluation comes after the training, because there is none in it."""
    model = make_model(600, hidden_size=32, num_layers=2).to(dtype)
    trainer = make_trainer(model, learning_rate=1e-2, **full)
    save_run(trainer, trainer.train().metrics)
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(tensor, trained[name]) for name, tensor in saved.items())
    assert "eval_ce_loss" in (tmp_path / "eval_results.json").read_text()


@pytest.mark.parametrize("full", FULL)
def test_an_evaluation_leaves_the_weights_as_they_are(make_trainer, tmp_path, full):
    """Before a training, after it, with a model that is loaded at the end; and so does a prediction."""
    trainer = make_trainer(**full, **EVALUATED, eval_on_start=True, load_best_model_at_end=True, save_only_model=True)
    watch = Evaluated()
    trainer.add_callback(watch)
    before = flat_weights(trainer.model).clone()
    buffers = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.evaluate()
    assert set(watch.types) == {torch.bfloat16 if "bf16_full_eval" in full else torch.float16}
    assert torch.equal(flat_weights(trainer.model), before)
    assert buffers
    assert all(torch.equal(buffers[name], buffer) for name, buffer in trainer.model.named_buffers())
    trainer.train()
    trained = flat_weights(trainer.model).clone()
    assert trained.dtype == torch.float32
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    trainer.save_model(tmp_path / "final")
    assert torch.equal(flat_weights(trainer.model), trained)
    assert {t.dtype for t in load_file(tmp_path / "final" / "model.safetensors").values()} == {torch.float32}


def test_the_model_is_saved_before_the_last_evaluation(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    metrics = trainer.train().metrics
    monkeypatch.setattr(trainer, "evaluate", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_run(trainer, metrics)
    assert (tmp_path / "model.safetensors").is_file()
