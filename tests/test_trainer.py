"""DFTTrainer in one process: its metrics against a recomputation, its evaluation, and what it refuses."""

import json
import math

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer

from dft.batching.collators import PaddingCollator
from dft.batching.sampler import FilledRows
from dft.loss.from_logits import count_terms
from examples.make_tiny_model import make_model
from tests.helpers import ROOT, change_of_weights, relative_error, rows
from tests.metrics.recomputation import recomputed


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluation_is_token_weighted(make_trainer, batch_size):
    trainer = make_trainer(dft_alpha=0.6, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    expected = recomputed(trainer.model, trainer.eval_dataset, 0.6)
    for name in ("loss", "ce_loss", "avg_p_correct", "acc"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-5), name
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_ce_loss"]))
    # both are rounded, the speed to 1e-3 and the runtime to 1e-4 seconds
    speed = metrics["eval_samples_per_second"]
    assert speed == pytest.approx(11 / metrics["eval_runtime"], rel=1e-2, abs=1e-3)


def test_training_metrics_are_those_of_the_tokens_trained_on(make_trainer):
    """Two accumulated micro-batches before the first update: the record equals a recomputation over both."""
    model = make_model(600, hidden_size=32, num_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30.0)  # so that it is sure of some tokens, and sure against others
    trainer = make_trainer(
        model,
        dft_alpha=0.6,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.0,
    )
    trainer.train()
    record = next(r for r in trainer.state.log_history if "ce_loss" in r)
    expected = recomputed(trainer.model, trainer.train_dataset, 0.6)
    assert 0 < expected["p_below_0.01"] < 1 > expected["p_above_0.99"] > 0
    for key, name in {
        "loss": "loss",
        "ce_loss": "ce_loss",
        "train/avg_p_correct": "avg_p_correct",
        "token_accuracy": "acc",
        "mean_weight": "mean_weight",
        "p_below_0.01": "p_below_0.01",
        "p_above_0.99": "p_above_0.99",
    }.items():
        assert record[key] == pytest.approx(expected[name], rel=1e-5), key
    assert record["train/dft_alpha"] == 0.6


def test_a_model_that_hardly_expects_the_data_is_said_so_once(make_trainer, caplog):
    """A random model has p = 1/600 everywhere: at alpha 1 next to no gradient, at 0.7 enough."""
    for alpha, times in ((1.0, 1), (0.7, 0)):
        caplog.clear()
        trainer = make_trainer(dft_alpha=alpha, max_steps=3)
        trainer.train()
        assert caplog.text.count("hardly learns them") == times
        record = next(r for r in trainer.state.log_history if "p_below_0.01" in r)
        assert record["p_below_0.01"] > 0.9


SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def test_alpha_0_trains_as_trainer_itself(make_trainer, tokenizer):
    """Three steps change the weights as the stock Trainer's cross-entropy does; a small alpha is told from it."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **SGD}
    ours = make_trainer(dft_alpha=0.0, **settings)
    stock = Trainer(
        make_model(600, hidden_size=32, num_layers=2),
        ours.args,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=ours.train_dataset,
    )
    expected = change_of_weights(stock)
    assert relative_error(change_of_weights(ours), expected) < 1e-5
    assert relative_error(change_of_weights(make_trainer(dft_alpha=0.01, **settings)), expected) > 1e-3


def test_metrics_every_few_steps_cover_all_steps_between(make_trainer):
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.0, "dft_alpha": 1.0}
    every = make_trainer(**settings)
    every.train()
    some = make_trainer(log_metrics_steps=4, **settings)
    some.train()
    rare = make_trainer(log_metrics_steps=100, **settings)
    rare.train()
    records = [r for r in every.state.log_history if "learning_rate" in r]
    sparse = [r for r in some.state.log_history if "learning_rate" in r]
    assert [("ce_loss" in r) for r in sparse] == [False, False, False, True]
    assert [r["loss"] for r in sparse] == pytest.approx([r["loss"] for r in records], rel=1e-5)
    whole = recomputed(every.model, every.train_dataset, 1.0)
    assert sparse[-1]["ce_loss"] == pytest.approx(whole["ce_loss"], rel=1e-5)
    assert sparse[-1]["train/avg_p_correct"] == pytest.approx(whole["avg_p_correct"], rel=1e-5)
    # the last record has them always, of all that were not recorded
    only = [r["ce_loss"] for r in rare.state.log_history if "ce_loss" in r]
    assert only == pytest.approx([sparse[-1]["ce_loss"]], rel=1e-5)
    assert records[-1]["ce_loss"] != pytest.approx(whole["ce_loss"], rel=1e-4)  # the last step alone


def test_the_dft_loss_is_no_measure_of_checkpoints(make_trainer, caplog):
    """Trainer takes it where the best model is to be loaded and no metric is named."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    make_trainer(**best, dft_alpha=0.0)
    make_trainer(**best, metric_for_best_model="eval_ce_loss")
    assert "metric_for_best_model" not in caplog.text
    make_trainer(**best)
    assert "metric_for_best_model is loss: the DFT loss also falls" in caplog.text


def test_compute_metrics_and_predict_still_work(make_trainer):
    trainer = make_trainer()
    trainer.compute_metrics = lambda prediction: {"rows": len(prediction.label_ids)}
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 11
    assert "eval_acc" in metrics
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == 11


@pytest.mark.parametrize("batch_size", [2, 16])
def test_an_evaluation_is_of_all_rows_where_incomplete_batches_are_dropped(make_trainer, batch_size):
    trainer = make_trainer(per_device_eval_batch_size=batch_size, dataloader_drop_last=True)
    metrics = trainer.evaluate()
    expected = recomputed(trainer.model, trainer.eval_dataset, 1.0)
    for name in ("ce_loss", "acc"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-5), name


def test_several_evaluation_sets_have_metrics_of_their_own(make_trainer):
    trainer = make_trainer()
    single = trainer.evaluate()
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": rows(5, seed=2)}
    metrics = trainer.evaluate()
    assert metrics["eval_a_ce_loss"] == pytest.approx(single["eval_ce_loss"], rel=1e-5)
    assert "eval_b_acc" in metrics


def test_kept_workers_do_not_mix_evaluation_sets(make_trainer):
    """Trainer keeps the workers' loaders by the name of the set."""
    settings = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    trainer = make_trainer(**settings)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": rows(5, seed=2)}
    metrics = trainer.evaluate()
    assert metrics["eval_b_ce_loss"] == pytest.approx(
        recomputed(trainer.model, rows(5, seed=2), 1.0)["ce_loss"], rel=1e-5
    )


def test_an_evaluation_set_without_a_length_is_token_weighted(make_trainer):
    trainer = make_trainer(dft_alpha=0.6)
    expected = recomputed(trainer.model, trainer.eval_dataset, 0.6)
    trainer.eval_dataset = trainer.eval_dataset.to_iterable_dataset()
    metrics = trainer.evaluate()
    for name in ("loss", "ce_loss", "avg_p_correct", "acc"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-5), name


def test_an_attempt_that_runs_out_of_memory_leaves_nothing_in_the_metrics(make_trainer, monkeypatch):
    """auto_find_batch_size starts anew with fewer rows."""
    settings = {"max_steps": 4, "logging_steps": 2}
    trainer = make_trainer(auto_find_batch_size=True, per_device_train_batch_size=8, **settings)
    compute_loss, calls = trainer.compute_loss, []

    def fail_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", fail_once)
    result = trainer.train()
    records = [r for r in trainer.state.log_history if "learning_rate" in r]
    assert [(r["step"], "ce_loss" in r) for r in records] == [(2, True), (4, True)]
    assert trainer._train_batch_size < 8
    expected = make_trainer(per_device_train_batch_size=trainer._train_batch_size, **settings).train()
    for key in ("train_steps", "train_tokens", "train_supervised_tokens"):
        assert result.metrics[key] == expected.metrics[key]


def test_training_twice_logs_twice(make_trainer):
    trainer = make_trainer(max_steps=2)
    for _ in range(2):
        trainer.train()
        assert [("ce_loss" in r) for r in trainer.state.log_history if "learning_rate" in r] == [True, True]


def test_a_model_that_takes_no_loss_arguments_is_normalized_all_the_same(make_trainer):
    """Remote code often has a forward without **kwargs; Trainer then counts no tokens."""

    class Plain(type(make_model(600, hidden_size=32, num_layers=1))):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    model = make_model(600, hidden_size=32, num_layers=2)
    plain, other = Plain(model.config), Plain(model.config)
    plain.load_state_dict(model.state_dict())
    other.load_state_dict(model.state_dict())
    settings = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "dft_alpha": 0.7, **SGD}
    expected = change_of_weights(make_trainer(model, **settings))
    assert relative_error(change_of_weights(make_trainer(plain, **settings)), expected) < 1e-5
    trainer = make_trainer(other, **settings)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, num_items_in_batch, **kwargs: compute_loss(
        model, inputs, *args, num_items_in_batch=3 * count_terms(inputs["labels"]), **kwargs
    )
    assert relative_error(change_of_weights(trainer), expected) > 1e-3  # the mean of the micro-batches' means


def test_padded_rows_supervise_nothing():
    padded = FilledRows(rows(11), multiple=4)
    assert len(padded) == 12
    assert padded[10]["labels"] == rows(11)[10]["labels"]
    assert set(padded[11]["labels"]) == {-100}
    assert len(padded[11]["input_ids"]) == len(padded[11]["labels"])
    with pytest.raises(IndexError):
        padded[12]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dft_alpha": 1.1}, "between 0"),
        ({"compute_loss_func": lambda *_: 0}, "drop compute_loss_func"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_what_would_change_the_loss_is_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


def test_deepspeed_configurations_differ_in_what_they_say():
    """Everything that the Trainer must fill in is auto; ZeRO-3 gathers the weights when it saves."""
    configs = {path.stem: json.loads(path.read_text()) for path in (ROOT / "ds_config").glob("*.json")}
    offloads = {"zero2_offload": "optimizer", "zero3_offload_optimizer": "optimizer", "zero3_offload": "both"}
    assert set(configs) == {"zero1", "zero2", "zero3", *offloads}
    for name, config in configs.items():
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            assert config[key] == "auto"
        assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
        zero = config["zero_optimization"]
        assert zero["stage"] == int(name.removeprefix("zero")[0])
        assert zero.get("stage3_gather_16bit_weights_on_model_save", zero["stage"] < 3)
        of_weights, of_states = (
            zero.get(key, {}).get("device", "none") for key in ("offload_param", "offload_optimizer")
        )
        assert of_weights == ("cpu" if offloads.get(name) == "both" else "none")
        assert of_states == ("cpu" if name in offloads else "none")


def test_loss_weights_reach_the_loss(make_trainer, tokenizer):
    """Rows weighted 0.5 have half the loss, and the same cross-entropy; a mixed batch is padded right."""
    metrics = {}
    for weight in (1.0, 0.5):
        trainer = make_trainer(dft_alpha=0.6)
        trainer.data_collator = PaddingCollator(tokenizer)
        data = rows(11, seed=1)
        trainer.eval_dataset = data.add_column("loss_weights", [[weight] * len(ids) for ids in data["input_ids"]])
        metrics[weight] = trainer.evaluate()
    assert metrics[0.5]["eval_loss"] == pytest.approx(0.5 * metrics[1.0]["eval_loss"], rel=1e-5)
    assert metrics[0.5]["eval_ce_loss"] == pytest.approx(metrics[1.0]["eval_ce_loss"], rel=1e-5)


def test_the_collator_pads_ids_labels_and_weights(tokenizer):
    short = {"input_ids": [5, 6], "labels": [-100, 6], "loss_weights": [1.0, 0.5]}
    long = {"input_ids": [5] * 9, "labels": [5] * 9, "loss_weights": [2.0] * 9}
    batch = PaddingCollator(tokenizer)([short, long])
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels", "loss_weights"), (2, 16)
    )
    assert batch["labels"][0].tolist() == [-100, 6] + [-100] * 14
    assert batch["attention_mask"].sum(1).tolist() == [2, 9]
    assert batch["loss_weights"][0].tolist() == [1.0, 0.5] + [1.0] * 14
    assert batch["loss_weights"][1].tolist() == [2.0] * 9 + [1.0] * 7
    plain = [{key: row[key] for key in ("input_ids", "labels")} for row in (short, long)]
    assert "loss_weights" not in PaddingCollator(tokenizer)(plain)
