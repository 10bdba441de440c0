"""The temperature of talr is the median over the rows of the step before, however the step was cut."""

import copy
from statistics import median

import pytest
import torch

from dft.batching.collators import FlatteningCollator
from dft.batching.varlen_attention import register
from examples.make_tiny_model import make_model
from tests.helpers import rows

SETTINGS = {"objective": "talr", "objective_args": {"tau": 2.0}, "learning_rate": 1e-2, "max_steps": 3}


def taus_of(trainer, checkpoint: str | None = None) -> list[float]:
    """Trains, and returns the tau that each micro-batch was weighed with."""
    taus = []
    score = trainer.scorer.score

    def noted(model, inputs, labels, token_weight, *args):
        taus.append(token_weight.objective.tau)
        return score(model, inputs, labels, token_weight, *args)

    trainer.scorer.score = noted
    trainer.train(resume_from_checkpoint=checkpoint)
    return taus


def mean_nll(model: torch.nn.Module, row: dict) -> float | None:
    """Of a row's supervised tokens, alone."""
    ids = torch.tensor(row["input_ids"])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), -1)
    supervised = torch.tensor(row["labels"][1:]) != -100
    found = -log_p.gather(1, ids[1:, None])[:, 0][supervised]
    return float(found.mean()) if len(found) else None


def test_tau_is_the_median_of_the_means_of_the_rows(make_trainer):
    model = make_model(600, hidden_size=32, num_layers=2)
    before = copy.deepcopy(model)
    trainer = make_trainer(model, per_device_train_batch_size=16, **SETTINGS)
    taus = taus_of(trainer)
    data = rows(16)
    means = [mean for i in range(16) if (mean := mean_nll(before, data[i])) is not None]
    assert taus[0] == 2.0
    assert taus[1] == pytest.approx(median(means), rel=1e-5)
    assert len(set(taus)) == 3


@pytest.mark.parametrize("batching", ["padded", "padding_free"])
def test_tau_does_not_depend_on_how_a_step_is_cut(make_trainer, batching):
    def trained(num_rows: int, micro_batches: int, batching: str = "padded"):
        model = make_model(600, hidden_size=32, num_layers=2)
        settings = {"per_device_train_batch_size": num_rows, "gradient_accumulation_steps": micro_batches}
        if batching == "padding_free":
            register()
            model.set_attn_implementation("varlen")
        trainer = make_trainer(model, **settings, **SETTINGS)
        if batching == "padding_free":
            trainer.data_collator = FlatteningCollator()
        return taus_of(trainer)[::micro_batches]

    assert trained(2, 8, batching) == pytest.approx(trained(16, 1), rel=1e-5)


def test_a_resumed_training_goes_on_with_its_tau(make_trainer, tmp_path):
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1, **SETTINGS}
    whole = make_trainer(**settings)
    taus = taus_of(whole)
    resumed = make_trainer(**settings)
    assert taus_of(resumed, str(tmp_path / "checkpoint-1")) == taus[1:]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name in ("temperature.json", "manifest.json"):  # as with another objective, of an older version
        (tmp_path / "checkpoint-1" / name).unlink()
    assert taus_of(make_trainer(**settings), str(tmp_path / "checkpoint-1")) != taus[1:]
