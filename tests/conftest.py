"""What the tests share: a small model made on the spot, templates, and a way to launch the program."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

# before torch and deepspeed are imported: tests run on CPU, on any machine
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
DATASETS_CACHE = tempfile.mkdtemp(prefix="dft-tests-")  # tokenised data of the runs below
os.environ["HF_DATASETS_CACHE"] = DATASETS_CACHE
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import DataCollatorForSeq2Seq, TrainingArguments  # noqa: E402

from dft_trainer import DFTTrainer  # noqa: E402
from scripts.make_example_data import dialogues_zh, facts_en, reasoning_en, tools_en  # noqa: E402
from scripts.make_tiny_model import make_model, make_tokenizer, strings  # noqa: E402


def pytest_unconfigure() -> None:
    shutil.rmtree(DATASETS_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What the program sets for libraries, or a test for the program, doesn't outlive the test."""
    with mock.patch.dict(os.environ):
        yield


# A ChatML template without generation tags, of the kind of Qwen2.5's: a default system prompt, tools, tool results
# inside a user turn
CHATML_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Of the kind of Qwen3's: thinking is kept in the turns after the last question and dropped before it
THINKING_TEMPLATE = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content or '' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""


@pytest.fixture
def tokenizer():
    """A byte-level BPE tokenizer without a chat template."""
    rows = facts_en()[:40] + dialogues_zh()[:20] + tools_en()[:4] + reasoning_en()[:20]
    return make_tokenizer(strings(rows), vocab_size=600)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Directory of a random model of two layers, with its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    rows = facts_en()[:40] + dialogues_zh()[:20] + tools_en()[:4] + reasoning_en()[:20]
    make_tokenizer(strings(rows), vocab_size=600).save_pretrained(directory)
    make_model(600, hidden_size=32, num_layers=2).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory) -> Path:
    """A file of 40 conversations of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = facts_en()[:16] + dialogues_zh()[:16] + tools_en()[:8]
    write_jsonl(path, rows)
    return path


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(command: list, *, timeout: int = 300, **env: str) -> subprocess.CompletedProcess:
    """Runs a command in the project's directory; the output holds stdout and stderr together."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def train(tiny_model, chat_file, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs scripts/train.sh on the tiny model and the chat file, two steps in float32 unless told otherwise."""

    def start(*flags, expect: int = 0, **env: str) -> subprocess.CompletedProcess:
        defaults = {"LAUNCHER": "python", "NPROC": "2", "LOG_DIR": str(tmp_path / "logs")}
        settings = [
            *("--model_name_or_path", tiny_model, "--data_files", chat_file, "--output_dir", tmp_path / "out"),
            *("--torch_dtype", "float32", "--max_steps", 2, "--per_device_train_batch_size", 2),
            *("--logging_steps", 1, "--disable_tqdm", "True"),
        ]
        result = run(["bash", "scripts/train.sh", *settings, *flags], **{**defaults, **env})
        assert result.returncode == expect, result.stdout[-6000:]
        return result

    return start


def read_log(output_dir: Path) -> list[dict]:
    """The records of train_log.jsonl."""
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


def rows(count: int, seed: int = 0) -> Dataset:
    """Rows of 4 to 40 tokens, of which the last half is supervised."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for i in range(count):
        ids = torch.randint(3, 300, (4 + 6 * (i % 7),), generator=generator).tolist()
        data.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return Dataset.from_list(data)


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """A trainer on a small model, with plain TrainingArguments, as a notebook would make it."""

    def make(model=None, **settings) -> DFTTrainer:
        names = set(inspect.signature(DFTTrainer.__init__).parameters) | {"compute_loss_func"}
        own = {name: settings.pop(name) for name in names if name in settings}
        args = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            **{
                "disable_tqdm": True,
                "per_device_eval_batch_size": 3,
                "logging_steps": 1,
                "max_steps": 2,
                "save_strategy": "no",
                **settings,
            },
        )
        return DFTTrainer(
            model or make_model(600, hidden_size=32, num_layers=2),
            args,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=rows(16),
            eval_dataset=rows(11, seed=1),
            **own,
        )

    return make
