"""scripts/evaluate.py gives the numbers of the training's own evaluation, and one message for a mistake."""

import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from dft.config.data import DataConfig
from dft.errors import UserError
from scripts import evaluate
from tests.helpers import write_jsonl

KEYS = ("ce_loss", "perplexity", "avg_p_correct", "acc")


@pytest.mark.launch
def test_the_numbers_are_those_of_the_training(train, chat_file, tmp_path, capsys):
    """With settings of data and loss that are not the defaults; of the model, and of a checkpoint."""
    rows = [json.loads(text) for text in chat_file.read_text().splitlines()]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", some) for name, some in (("a", rows[:9]), ("b", rows[9:15]))]
    flags = ("--eval_data_files", *files, "--max_length", 48, "--train_on", "last", "--dft_alpha", 0.6)
    flags += ("--dft_floor", 0.1, "--loss_normalization", "turn", "--dft_special_tokens", "ce")
    flags += ("--learning_rate", 0.01, "--save_steps", 1, "--eval_steps", 1, "--channels", "file")
    train(*flags, NPROC="1")
    out = tmp_path / "out"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    for model, step in ((out, 2), (out / "checkpoint-1", 1)):
        scores = tmp_path / f"scores{step}.json"
        evaluate.main([str(model), "--data_files", *map(str, files), "--output", str(scores), "--batch_size", "3"])
        found = json.loads(scores.read_text())
        expected = next(r for r in history if r["step"] == step and "eval_ce_loss" in r)
        assert {"loss", "ce_loss", "perplexity", "avg_p_correct", "acc", "channel/a/acc", "channel/b/ce_loss"} <= set(
            found
        )
        for key, value in found.items():
            assert value == pytest.approx(expected[f"eval_{key}"], rel=1e-5), key
    assert found["ce_loss"] != pytest.approx(json.loads((tmp_path / "scores2.json").read_text())["ce_loss"], rel=1e-4)
    header, everything, a, b, counts = capsys.readouterr().out.splitlines()[-5:]
    assert header.split() == ["CE", "perplexity", "p_correct", "accuracy"]
    assert everything.split() == [
        "all",
        *(f"{found[k]:.4f}" for k in ("ce_loss", "perplexity", "avg_p_correct", "acc")),
    ]
    assert [a.split()[0], b.split()[0]] == ["a", "b"]
    assert counts.startswith("15 rows, ")


def test_a_model_from_elsewhere_has_no_settings(tiny_model, chat_file, tmp_path, capsys):
    """Those of the loss are not guessed: what depends on them is left out. Nor need it have a padding token."""
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "pad_token"}))
    scores = tmp_path / "scores.json"
    evaluate.main([str(tmp_path / "model"), "--data_files", str(chat_file), "--output", str(scores)])
    assert set(json.loads(scores.read_text())) == {*KEYS, "p_below_0.01", "p_above_0.99"}
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_files", "no.jsonl"], "no.jsonl: no such file"),
        (["--batch_size", "0"], "--batch_size and --max_length must be at least 1"),
        (["--output", "/proc/x/y.json"], "--output /proc/x/y.json can't be written"),
    ],
)
def test_mistakes_are_the_users(tiny_model, chat_file, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([str(tiny_model), "--data_files", str(chat_file), *flags])


def test_malformed_rows_may_be_dropped(tiny_model, chat_file, tmp_path, capsys):
    """As the message about them says."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text(chat_file.read_text() + "{\n")
    command = [str(tiny_model), "--data_files", str(broken)]
    with pytest.raises(UserError, match="--data_validation lenient"):
        evaluate.main(command)
    evaluate.main([*command, "--data_validation", "lenient"])
    assert "1 rows dropped" in capsys.readouterr().out


def test_what_mixed_the_training_data_is_not_asked_of_other_files():
    run = asdict(DataConfig(["a.jsonl", "b.jsonl"], mix="1:2", stages="stages.yaml", max_length=77))
    names = ("data_format", "data_validation", "max_length", "channels")
    args = SimpleNamespace(data_files=["test.jsonl"], **dict.fromkeys(names))
    config = evaluate.data_config(args, run)
    assert (config.mix, config.stages, config.data_weights) == (None, None, None)
    assert (config.data_files, config.max_length) == (["test.jsonl"], 77)


def test_settings_of_another_version_are_refused(tiny_model, chat_file, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "run.json").write_text('{"dft": {"dft_beta": 1.0}}')
    with pytest.raises(UserError, match="run.json is of another version.*dft_beta"):
        evaluate.main([str(tmp_path / "model"), "--data_files", str(chat_file)])


def test_a_model_without_a_tokenizer_is_refused(tiny_model, chat_file, tmp_path):
    """transformers makes an empty tokenizer of its configuration."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_model / name, tmp_path / "model" / name)
    with pytest.raises(UserError, match="there are no files of a tokenizer"):
        evaluate.main([str(tmp_path / "model"), "--data_files", str(chat_file)])


def test_a_directory_that_is_no_model_is_refused(tmp_path, chat_file, tiny_model):
    with pytest.raises(UserError, match="is not a model directory"):
        evaluate.main([str(tmp_path), "--data_files", str(chat_file)])
    shutil.copytree(tiny_model, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="the model can't be loaded"):
        evaluate.main([str(tmp_path / "broken"), "--data_files", str(chat_file)])
