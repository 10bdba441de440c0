"""Runs of a model that doesn't fit the data: refused before training, or made to fit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from examples.make_tiny_model import make_model
from tests.helpers import read_log, run, tiny_run, write_jsonl

CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "a zebra and a yak"}]}
    for i in range(8)
]


@pytest.fixture
def grown_model(tokenizer, tmp_path):
    """A model of 600 rows beside a tokenizer of 602 tokens, and data that holds the two."""

    def make(is_tied: bool):
        directory = tmp_path / "model"
        tokenizer.add_tokens(["zebra", "yak"])
        tokenizer.save_pretrained(directory)
        config = make_model(600, hidden_size=32, num_layers=2).config
        config.tie_word_embeddings = is_tied
        torch.manual_seed(0)
        model = type(make_model(600, hidden_size=32, num_layers=1))(config)
        with torch.no_grad():
            model.get_input_embeddings().weight += 0.5
        model.save_pretrained(directory)
        return directory

    return make


@pytest.mark.launch
@pytest.mark.parametrize("is_tied", [True, False])
def test_rows_are_added_under_zero3(train, grown_model, tmp_path, is_tied):
    """With a learning rate of 0, what is saved is what was loaded, and the new rows."""
    model = grown_model(is_tied)
    data = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    flags = ("--model_name_or_path", model, "--data_files", data, "--resize_embeddings", "True")
    result = train(*flags, "--learning_rate", "0", "--validation_split_percentage", "20", LAUNCHER="deepspeed")
    assert "2 rows more, 602 in all: each is the mean of the 600" in result.stdout
    assert all(0 < record["ce_loss"] < 20 for record in read_log(tmp_path / "out") if "ce_loss" in record)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 602
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) is not is_tied
    for name, old in before.items():
        new = after[name].float()
        torch.testing.assert_close(new[: len(old)], old, rtol=0, atol=0)
        if len(new) > len(old):
            torch.testing.assert_close(new[600:], old.mean(0).expand(2, -1), rtol=1e-6, atol=1e-6)
    assert {name for name, old in before.items() if len(after[name]) > len(old)} == {
        "model.embed_tokens.weight",
        *([] if is_tied else ["lm_head.weight"]),
    }


@pytest.mark.launch
def test_a_token_without_a_row_and_a_row_without_positions_are_refused(grown_model, tokenizer, tmp_path):
    """A dry run says so too, with one message, and after the report."""
    data = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    command = ["python", "train_dft.py", *tiny_run(grown_model(True), data, tmp_path / "out"), "--dry_run", "True"]
    result = run(command)
    assert result.returncode == 2
    assert "error: the model's embedding has 600 rows" in result.stdout
    assert "zebra (600), yak (601)" in result.stdout
    assert "Traceback" not in result.stdout

    config = GPT2Config(vocab_size=602, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    result = run(command)
    assert result.returncode == 2
    assert "and the model a table of 16 positions: --max_length 16 cuts longer rows" in result.stdout
    assert "Traceback" not in result.stdout
