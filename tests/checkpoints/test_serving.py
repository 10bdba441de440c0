"""Saved models are ready to be served: they stop where turns were trained to end, and with what else they came."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dft.batching.collators import PaddingCollator
from dft.chat.format import ChatFormat
from dft.model.tokenizer import load_tokenizer
from dft.model.trained import load_trained, turn_end_token
from examples.make_tiny_model import make_model
from tests.helpers import CHATML_TEMPLATE

TURN = "{% generation %}{{ message.content }}END{% endgeneration %}"
OTHERS = "{{ message.content }}: "
TAGGED = "{% for message in messages %}{% if message.role == 'assistant' %}TURN{% else %}OTHERS{% endif %}{% endfor %}"


def tagged(end: str) -> str:
    """A template with generation tags, whose assistant turns end so."""
    return TAGGED.replace("TURN", TURN.replace("END", end)).replace("OTHERS", OTHERS)


@pytest.fixture
def base(tokenizer):
    """The tokenizer of a base model: it knows <|im_end|>, and texts end with <|endoftext|>."""
    tokenizer.chat_template = CHATML_TEMPLATE
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def base_model(tokenizer, stops_at="<|endoftext|>"):
    model = make_model(600, hidden_size=32, num_layers=2)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(stops_at))
    return model


def end_tokens(directory: Path, tokenizer) -> list[str]:
    """What the generation config in a directory stops at, as its file has it."""
    found = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    return tokenizer.convert_ids_to_tokens(found if isinstance(found, list) else [found])


class AlwaysSays(torch.nn.Module):
    """A head that is sure of one token."""

    def __init__(self, token: int):
        super().__init__()
        self.token = token

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], 600)
        logits[..., self.token] = 9.0
        return logits


def length_of_answer(directory: Path, says: int) -> int:
    """The tokens that plain transformers generates, of 8 at most, where the model always says one token."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.lm_head = AlwaysSays(says)
    prompt = torch.arange(5, 15)[None]
    return (
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False).shape[1] - 10
    )


def test_a_trained_base_model_stops_at_the_end_of_a_turn(make_trainer, base, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = make_trainer(
        base_model(base), processing_class=base, save_strategy="steps", save_steps=1, save_only_model=True
    )
    trainer.train()
    trainer.save_model(tmp_path / "final")
    im_end, end_of_text, other = base.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "a"])
    for name in ("checkpoint-1", "checkpoint-2", "final"):
        assert end_tokens(tmp_path / name, base) == ["<|endoftext|>", "<|im_end|>"]
        assert load_trained(tmp_path / name).end_tokens == sorted([im_end, end_of_text])
    lengths = [length_of_answer(tmp_path / "final", says) for says in (im_end, end_of_text, other)]
    assert lengths == [1, 1, 8]
    assert caplog.text.count("Saved models stop at <|im_end|>") == 1
    base_model(base).save_pretrained(tmp_path / "base")
    assert length_of_answer(tmp_path / "base", im_end) == 8


@pytest.mark.parametrize("own", [None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>"]])
def test_what_it_stopped_at_before_stays(make_trainer, base, tmp_path, own):
    trainer = make_trainer(base_model(base, own) if own else base_model(base), processing_class=base)
    if own is None:
        trainer.model.generation_config.eos_token_id = None
    trainer.save_model(tmp_path / "final")
    expected = [own] if isinstance(own, str) else own or []
    assert end_tokens(tmp_path / "final", base) == [*expected, *([] if "<|im_end|>" in expected else ["<|im_end|>"])]


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_head_is_written_once(make_trainer, base, tmp_path, is_tied):
    """Weights that were gathered from several processes come as copies; what isn't alike is kept."""
    trainer = make_trainer(base_model(base), processing_class=base)
    gathered = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    if not is_tied:
        gathered["lm_head.weight"] += 1
    trainer._save(str(tmp_path), state_dict=dict(gathered))
    saved = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in saved) == (not is_tied)
    assert all(torch.equal(saved[name], gathered[name]) for name in saved)
    assert saved.keys() | {"lm_head.weight"} == gathered.keys()


def test_resuming_warns_of_missing_weights_but_not_of_a_tied_head(make_trainer, base, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda message, *_: said.append(message))
    saves = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(base_model(base), processing_class=base, max_steps=1, **saves).train()
    make_trainer(base_model(base), processing_class=base, max_steps=2, **saves).train(resume_from_checkpoint=True)
    assert not [message for message in said if "missing" in message]
    trainer = make_trainer(base_model(base), processing_class=base)
    lacking = trainer.model.load_state_dict({}, strict=False)
    trainer._issue_warnings_after_load(lacking)
    assert "model.embed_tokens.weight" in said[-1]
    assert "lm_head.weight" not in said[-1]


def test_an_adapter_gets_a_generation_config_of_its_own(make_trainer, base, tmp_path):
    model = get_peft_model(base_model(base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = make_trainer(model, processing_class=base, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for name in ("checkpoint-2", "final"):
        assert (tmp_path / name / "adapter_config.json").is_file()
        assert not (tmp_path / name / "config.json").exists()
        assert end_tokens(tmp_path / name, base) == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML_TEMPLATE, "<|im_end|>"),
        (tagged("<|im_end|>\n"), "<|im_end|>"),
        (tagged("\n<|im_end|>"), "<|im_end|>"),
        (tagged("</think><|endoftext|>"), "<|endoftext|>"),
        (tagged(""), None),
        (tagged(" ###\n"), None),
        (tagged("."), None),
    ],
)
def test_the_end_of_a_turn_is_a_token_of_its_own(tokenizer, template, end):
    """A full stop or a line break would end answers in their middle."""
    tokenizer.chat_template = template
    found = turn_end_token(ChatFormat(tokenizer))
    assert found == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_a_template_without_an_end_is_said_and_changes_nothing(make_trainer, base, tmp_path, caplog):
    base.chat_template = tagged("")
    make_trainer(base_model(base), processing_class=base).save_model(tmp_path / "final")
    assert end_tokens(tmp_path / "final", base) == ["<|endoftext|>"]
    assert "ends an assistant turn with no special token" in caplog.text


@pytest.mark.parametrize("processing_class", [True, False])
def test_without_a_template_nothing_is_known_of_turns(make_trainer, tokenizer, tmp_path, processing_class):
    """Neither is the tokenizer of a notebook given a template."""
    trainer = make_trainer(base_model(tokenizer), processing_class=tokenizer if processing_class else None)
    trainer.save_model(tmp_path / "final")
    assert end_tokens(tmp_path / "final", tokenizer) == ["<|endoftext|>"]
    assert tokenizer.chat_template is None


def test_the_saved_model_has_a_cache(make_trainer, base, tmp_path):
    """A base that another program has trained may say False; the training itself is left as it was."""
    trainer = make_trainer(base_model(base), processing_class=base, gradient_checkpointing=True, save_strategy="epoch")
    trainer.model.config.use_cache = trainer.model.generation_config.use_cache = False
    trainer.train()
    assert trainer.model.config.use_cache is False
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert json.loads((checkpoint / "config.json").read_text())["use_cache"] is True
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.config.use_cache is True
    assert model.generation_config.use_cache is not False


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_is_saved_with_its_sides(make_trainer, base, tmp_path, side):
    base.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": side, "truncation_side": side}))
    loaded = load_tokenizer(str(tmp_path / "base"), "base")
    row = {"input_ids": [5, 6], "labels": [-100, 6], "loss_weights": [1.0, 0.5]}
    batch = PaddingCollator(loaded)([row])
    assert batch["input_ids"][0, :2].tolist() == [5, 6]  # rows are padded on the right all the same
    assert batch["labels"][0, :2].tolist() == [-100, 6]
    make_trainer(base_model(base), processing_class=loaded).save_model(tmp_path / "final")
    saved = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert (saved.padding_side, saved.truncation_side) == (side, side)
