"""scripts/chat.py: answers token by token, conversations, the pipe and the terminal."""

import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from dft.errors import UserError
from dft.model.trained import find_end_tokens, load_trained
from scripts import chat
from tests.chat.families import FAMILIES
from tests.chat.families import tokenizer as family_tokenizer
from tests.helpers import ROOT, TIMEOUT, run_programs


@pytest.fixture
def conversation(tiny_model) -> chat.Chat:
    """With a model that never ends its answer itself: one that is not trained might do so after any token."""
    trained = load_trained(tiny_model)
    trained.model.generation_config.suppress_tokens = trained.end_tokens
    return chat.Chat(trained, "Be brief.", max_new_tokens=12, temperature=0.0)


def test_an_answer_is_the_likeliest(conversation, tiny_model, capsys):
    answer = conversation.answer("Hi")
    assert capsys.readouterr().out == answer + "\n"
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant"]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = conversation.tokenizer(text, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for _ in range(12):
        logits = model(ids).logits[:, -1:]
        logits[..., conversation.end_tokens] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    made = ids[0, -12:].tolist()
    assert conversation.tokenizer.decode(made, skip_special_tokens=True) == answer


@pytest.mark.parametrize("name", ["qwen3", "llama2", "gemma"])  # byte-level, and of SentencePiece's kind
def test_tokens_are_printed_as_they_are_made(name, capsys):
    tokenizer = family_tokenizer(name)
    text = "The capital\n  of 法国 is 👍 Paris."
    ids = tokenizer.encode(text, add_special_tokens=False)
    printer = chat.TokenPrinter(tokenizer)
    printer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    shown = []
    for token in ids:
        printer.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(shown)
    assert sum(map(bool, shown)) > len(shown) / 2


def test_a_conversation_grows_until_it_is_reset(conversation, capsys):
    said = iter(["Hi", "Again", "/reset", " Name it. ", ""])
    lengths = []

    def ask(prompt: str) -> str:
        lengths.append(len(conversation.messages))
        return next(said)

    chat.converse(conversation, ask)
    assert lengths == [1, 3, 5, 1, 3]
    assert conversation.messages[1]["content"] == "Name it."
    assert capsys.readouterr().out.startswith(chat.HELP)


def test_a_conversation_longer_than_the_context_is_refused_and_goes_on(conversation, capsys):
    conversation.context = 60
    chat.converse(conversation, _asks("Hi", "long " * 60))
    shown = capsys.readouterr().out
    assert "tokens, and the model takes 60; /reset begins a new one)" in shown
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    conversation.reset()
    with pytest.raises(UserError, match="the model takes 60"):
        conversation.answer("long " * 60)


def _asks(*lines: str):
    """Says the lines, and then ends the input."""
    waiting = list(lines)

    def ask(prompt: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return ask


def test_an_answer_that_fills_the_context_is_said_to_be_cut(conversation, capsys):
    conversation.context = 32
    conversation.answer("Hi")
    assert "the model's context of 32 tokens is full" in capsys.readouterr().err
    conversation.context = 2048
    conversation.reset()
    conversation.answer("Hi")
    assert "(cut after 12 tokens: see --max_new_tokens)" in capsys.readouterr().err


def test_an_interrupted_answer_is_kept_and_the_conversation_goes_on(conversation, monkeypatch, capsys):
    token = conversation.tokenizer.encode("Paris")[0]

    def generate(*, streamer, **settings):
        streamer.put(torch.tensor([[5, 6]]))
        streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.model, "generate", generate)
    chat.converse(conversation, _asks("Hi", "Again"))
    assert [m["content"] for m in conversation.messages[2::2]] == [conversation.tokenizer.decode([token])] * 2
    with pytest.raises(KeyboardInterrupt):
        conversation.answer("Once more")


def test_a_template_that_refuses_the_system_prompt_is_the_users_mistake(tiny_model):
    trained = load_trained(tiny_model)
    trained.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match="refuses the conversation: System role not supported"):
        chat.Chat(trained, "Be brief.", 5, 0.0).answer("Hi")


@pytest.mark.parametrize(
    ("name", "ends"),
    [("gemma", {"<end_of_turn>", "<eos>"}), ("llama3", {"<|eot_id|>"}), ("phi3", {"<|end|>", "<|endoftext|>"})],
)
def test_answers_end_where_turns_were_trained_to_end(tiny_model, name, ends):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), family_tokenizer(name)
    assert FAMILIES[name].template == name
    for own in (None, tokenizer.eos_token_id, [tokenizer.eos_token_id]):
        model.generation_config.eos_token_id = own
        assert set(tokenizer.convert_ids_to_tokens(find_end_tokens(model, tokenizer))) == ends


def test_devices_that_are_not_there_are_refused():
    assert chat.find_device("auto") == chat.find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:1 isn't there; this machine has cpu and no accelerator"):
        chat.find_device("cuda:1")
    with pytest.raises(UserError, match="--device gpu: no such kind of device"):
        chat.find_device("gpu")


def test_devices_of_a_machine_with_gpus_are_found(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [chat.find_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        *(torch.device("cuda"), torch.device("cuda"), torch.device("cuda:1"), torch.device("cpu"))
    ]
    for name in ("cuda:2", "mps"):
        with pytest.raises(UserError, match=f"--device {name} isn't there; this machine has cpu and 2 x cuda"):
            chat.find_device(name)


# ---- as people start it -------------------------------------------------------------------------


@pytest.mark.launch
def test_mistakes_in_scripts_are_status_2_and_one_message(tiny_model, tmp_path):
    commands = {
        "not a model": ["scripts/chat.py", "tests", "Hi"],
        "no such device": ["scripts/chat.py", tiny_model, "Hi", "--device", "cuda"],
        "nothing in the pipe": ["scripts/chat.py", tiny_model],
        "output not empty": ["scripts/export.py", tiny_model, "--output", "tests"],
        "no runs": ["scripts/plot_runs.py", tmp_path],
    }
    for outcome in run_programs(commands, tmp_path / "outcomes").values():
        assert outcome.status == 2, outcome.output
        assert outcome.output.startswith("error: ")
        assert "Traceback" not in outcome.output


@pytest.mark.launch
def test_a_prompt_from_a_pipe_is_answered_by_an_adapter(adapter):
    command = [sys.executable, "scripts/chat.py", adapter, "--max_new_tokens", "16"]
    result = subprocess.run(command, cwd=ROOT, input="Hi\n", capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    expected = chat.Chat(load_trained(adapter), None, max_new_tokens=16, temperature=0.0).answer("Hi")
    assert result.stdout == expected + "\n"


def test_a_pipe_that_is_not_text_is_refused(monkeypatch):
    """Python's UTF-8 mode, which LANG=C.UTF-8 turns on, takes any bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8", errors="surrogateescape"))
    with pytest.raises(UserError, match="the piped prompt is not text"):
        chat.read_pipe()


@pytest.mark.launch
def test_a_conversation_at_a_terminal_ends_with_status_0(tiny_model):
    ours, theirs = pty.openpty()
    command = [sys.executable, "scripts/chat.py", tiny_model, "--max_new_tokens", "4"]
    program = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + TIMEOUT
    for said in (b"Hi\n", b"/reset\n", b"/exit\n"):
        while not shown.endswith(b"> "):
            assert select.select([ours], [], [], deadline - time.monotonic())[0], shown
            shown += os.read(ours, 4096)
        shown += b"\n"
        os.write(ours, said)
    assert program.wait(timeout=TIMEOUT) == 0
    os.close(ours)
    assert chat.HELP.encode() in shown
    assert b"Traceback" not in shown
