"""Fixtures of all tests: a small model made on the spot, data, and a way to launch the program."""

import inspect
import os
import shutil
import subprocess
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
DATASETS_CACHE = tempfile.mkdtemp(prefix="dft-tests-")  # tokenized data of the runs below
os.environ["HF_DATASETS_CACHE"] = DATASETS_CACHE
os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).parent.parent / ".torch_extensions"))

from transformers import DataCollatorForSeq2Seq, TrainingArguments  # noqa: E402

from dft_trainer import DFTTrainer  # noqa: E402
from examples.make_example_data import dialogues_zh, facts_en, reasoning_en, tools_en  # noqa: E402
from examples.make_tiny_model import make_model, make_tokenizer, strings  # noqa: E402
from tests.helpers import rows, run, write_jsonl  # noqa: E402


def pytest_unconfigure() -> None:
    shutil.rmtree(DATASETS_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What the program sets for libraries, or a test for the program, doesn't outlive the test."""
    with mock.patch.dict(os.environ):
        yield


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
