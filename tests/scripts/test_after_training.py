"""What is done with trained models: runs compared, a model talked to, an adapter or a checkpoint exported."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging

from dft.errors import UserError
from dft.model.trained import find_end_tokens, load_trained
from scripts import chat, export, plot_runs
from tests.chat.families import FAMILIES
from tests.chat.families import tokenizer as family_tokenizer
from tests.helpers import ROOT, run


@pytest.fixture(autouse=True)
def keep_progress_bars():
    yield
    logging.enable_progress_bar()  # which the scripts turn off for the process


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A directory with a LoRA adapter whose weights are random, and with the tokenizer."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    (directory / "README.md").write_text("What this adapter is.\n")
    return directory


def with_base(adapter, directory, base: str):
    """A copy of an adapter that names another base model."""
    shutil.copytree(adapter, directory)
    settings = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    return directory


# ---- runs compared ------------------------------------------------------------------------------


def write_log(directory, ce: float, evaluated: bool = True):
    directory.mkdir(parents=True)
    records = [{"step": i, "ce_loss": ce / i, "train/avg_p_correct": 0.1 * i, "loss": 7.0} for i in (1, 2, 3)]
    records.append({"step": 4, "ce_loss": None, "loss": 7.0})
    if evaluated:
        records += [{"step": i, "eval_ce_loss": ce, "eval_avg_p_correct": 0.5, "eval_loss": 7.0} for i in (2, 3)]
    (directory / "train_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def test_runs_are_drawn_over_one_another(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: (figures.append(self), save(self, *args, **more))
    )
    runs = [write_log(tmp_path / "sft", 4.0), write_log(tmp_path / "dft", 2.0, evaluated=False)]
    plot_runs.main([*map(str, runs), "--output", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    cross_entropy, p_correct = figures[0].axes
    lines = [(line.get_color(), line.get_marker(), list(line.get_ydata())) for line in cross_entropy.lines]
    assert [(color, marker, values[:3]) for color, marker, values in lines] == [
        ("C0", "None", [4.0, 2.0, 4 / 3]),
        ("C0", "o", [4.0, 4.0]),
        ("C1", "None", [2.0, 1.0, 2 / 3]),
        ("C1", "o", []),
    ]
    assert max(max(line.get_ydata(), default=0) for line in p_correct.lines) == 0.5
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["sft", "dft", "training", "evaluation"]


def test_a_picture_is_where_it_is_said_to_be(tmp_path, capsys):
    plot_runs.main([str(write_log(tmp_path / "run", 4.0)), "--names", "$x_1$", "--output", str(tmp_path / "picture")])
    assert capsys.readouterr().out == f"{tmp_path / 'picture.png'}\n"
    assert (tmp_path / "picture.png").is_file()


def test_names_of_runs(tmp_path):
    first, second = tmp_path / "a" / "model", tmp_path / "b" / "model"
    assert plot_runs.run_names([first, tmp_path / "b"], None) == ["model", "b"]
    assert plot_runs.run_names([first, second], None) == [str(first), str(second)]
    assert plot_runs.run_names([first, second], ["SFT", "DFT"]) == ["SFT", "DFT"]


@pytest.mark.parametrize(
    ("log", "flags", "message"),
    [
        (None, [], "train_log.jsonl can't be read"),
        ("", [], "holds none of ce_loss, eval_ce_loss"),
        ('{"step": 1, "loss": 1.0}\n', [], "holds none of ce_loss"),
        ('{"step": 1, "ce_loss": null}\n', [], "holds none of ce_loss"),
        ('{"step": 1, "ce_loss": 1.0}\n{"st', [], "train_log.jsonl:2: not a record"),
        ('{"ce_loss": 1.0}\n', [], "train_log.jsonl:1: not a record of a training .*'step'"),
        ("[1]\n", [], "train_log.jsonl:1: not a record"),
        ('{"step": 1, "ce_loss": 1.0}\n', ["--names", "a", "b"], "2 names for 1 runs"),
        ('{"step": 1, "ce_loss": 1.0}\n', ["--output", "no/such/a.png"], "no/such/a.png can't be written"),
        ('{"step": 1, "ce_loss": 1.0}\n', ["--output", "a.picture"], "a.picture can't be written"),
    ],
)
def test_mistakes_in_runs(tmp_path, monkeypatch, log, flags, message):
    monkeypatch.chdir(tmp_path)
    if log is not None:
        (tmp_path / "train_log.jsonl").write_text(log)
    with pytest.raises(UserError, match=message):
        plot_runs.main([str(tmp_path), *flags])


# ---- a model talked to --------------------------------------------------------------------------


@pytest.fixture
def conversation(tiny_model):
    return chat.Chat(load_trained(tiny_model), "Be brief.", max_new_tokens=12, temperature=0.0)


def test_an_answer_is_the_likeliest(conversation, tiny_model, capsys):
    answer = conversation.answer("Hi")
    assert capsys.readouterr().out == answer + "\n"
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant"]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = conversation.tokenizer(text, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    made = ids[0, -12:].tolist()
    assert conversation.tokenizer.decode(made, skip_special_tokens=True) == answer


@pytest.mark.parametrize("name", ["qwen3", "llama2", "gemma"])  # byte-level, and of SentencePiece's kind
def test_tokens_are_printed_as_they_are_made(name, capsys):
    tokenizer = family_tokenizer(name)
    text = "The capital\n  of 法国 is 👍 Paris."
    ids = tokenizer.encode(text, add_special_tokens=False)
    printer = chat.Printer(tokenizer)
    printer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    shown = []
    for token in ids:
        printer.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(shown)
    assert sum(map(bool, shown)) > len(shown) / 2


def test_a_conversation(conversation, capsys):
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


def test_a_template_that_refuses_the_system_prompt(tiny_model):
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


def test_devices():
    assert chat.find_device("auto") == chat.find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:1 isn't there; this machine has cpu and no accelerator"):
        chat.find_device("cuda:1")
    with pytest.raises(UserError, match="--device gpu: no such kind of device"):
        chat.find_device("gpu")


def test_devices_of_a_machine_with_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [chat.find_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        *(torch.device("cuda"), torch.device("cuda"), torch.device("cuda:1"), torch.device("cpu"))
    ]
    for name in ("cuda:2", "mps"):
        with pytest.raises(UserError, match=f"--device {name} isn't there; this machine has cpu and 2 x cuda"):
            chat.find_device(name)


def test_what_cannot_be_loaded(adapter, tiny_model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not a model directory: neither config.json nor adapter_config.json"):
        load_trained(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="broken: the model can't be loaded"):
        load_trained(broken)
    moved = with_base(adapter, tmp_path / "moved", "outputs/no-such-base")
    with pytest.raises(UserError, match="its base model outputs/no-such-base can't be loaded"):
        load_trained(moved)
    wide = tmp_path / "wide"
    shutil.copytree(adapter, wide)
    (wide / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="wide: the model can't be loaded"):
        load_trained(wide)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        load_trained(adapter)


# ---- exports ------------------------------------------------------------------------------------


def answer_of(directory) -> str:
    return chat.Chat(load_trained(directory), None, max_new_tokens=16, temperature=0.0).answer("Hi")


def test_a_merged_adapter_is_the_base_with_the_adapter(adapter, tiny_model, tmp_path):
    export.main([str(adapter), "--output", str(tmp_path / "merged")])
    ids = torch.arange(5, 45)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = load_trained(adapter).model(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (base(ids).logits - expected).abs().max() > 0.1
    assert answer_of(tmp_path / "merged") == answer_of(adapter) != answer_of(tiny_model)
    assert (tmp_path / "merged" / "README.md").read_text() == "What this adapter is.\n"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template is not None


def test_a_model_in_another_dtype_and_in_shards(tiny_model, tmp_path):
    out = tmp_path / "out"
    export.main([str(tiny_model), "--output", str(out), "--dtype", "bfloat16", "--max_shard_size", "50KB"])
    original = load_file(tiny_model / "model.safetensors")
    shards = [load_file(path) for path in out.glob("model-*.safetensors")]
    assert len(shards) > 1
    saved = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name].bfloat16()) for name in saved)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert GenerationConfig.from_pretrained(out).eos_token_id == load_trained(tiny_model).end_tokens


def test_exports_that_are_refused(adapter, tiny_model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    for place, message in (("full", "isn't empty"), ("full/mine.txt", "can't be made: File exists")):
        with pytest.raises(UserError, match=message):
            export.main([str(adapter), "--output", str(tmp_path / place)])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="--max_shard_size 5: give a number and a unit"):
        export.main([str(adapter), "--output", str(tmp_path / "new"), "--max_shard_size", "5"])
    prefix = tmp_path / "prefix"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).save_pretrained(prefix)
    with pytest.raises(UserError, match="PREFIX_TUNING puts tokens before the prompt, and can't be merged"):
        export.main([str(prefix), "--output", str(tmp_path / "new")])


# ---- as people start them -----------------------------------------------------------------------


@pytest.mark.launch
def test_mistakes_are_status_2_and_one_message(tiny_model, tmp_path):
    for command in (
        ["scripts/chat.py", "tests", "Hi"],
        ["scripts/chat.py", tiny_model, "Hi", "--device", "cuda"],
        ["scripts/chat.py", tiny_model],  # nothing comes out of the pipe
        ["scripts/export.py", tiny_model, "--output", "tests"],
        ["scripts/plot_runs.py", tmp_path],
    ):
        result = run([sys.executable, *command])
        assert result.returncode == 2, result.stdout
        assert result.stdout.startswith("error: ")
        assert "Traceback" not in result.stdout


@pytest.mark.launch
def test_a_prompt_from_a_pipe_to_an_adapter(adapter):
    command = [sys.executable, "scripts/chat.py", adapter, "--max_new_tokens", "16"]
    result = subprocess.run(command, cwd=ROOT, input="Hi\n", capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout == answer_of(adapter) + "\n"


def test_a_pipe_that_is_not_text(monkeypatch):
    """Python's UTF-8 mode, which LANG=C.UTF-8 turns on, takes any bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8", errors="surrogateescape"))
    with pytest.raises(UserError, match="the piped prompt is not text"):
        chat.read_pipe()


@pytest.mark.launch
def test_a_conversation_at_a_terminal(tiny_model):
    ours, theirs = pty.openpty()
    command = [sys.executable, "scripts/chat.py", tiny_model, "--max_new_tokens", "4"]
    program = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = ""
    for said in ("Hi\n", "/reset\n", "/exit\n"):
        while not shown.endswith("> "):
            shown += os.read(ours, 4096).decode()
        shown += "\n"
        os.write(ours, said.encode())
    assert program.wait(timeout=60) == 0
    os.close(ours)
    assert chat.HELP in shown
    assert "Traceback" not in shown
