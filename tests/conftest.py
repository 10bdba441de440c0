"""Fixtures of all tests: a small model made on the spot, data, and a way to launch the program."""

import inspect
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from unittest import mock

import hypothesis
import pytest

# What a user's shell may hold for the scripts, the trackers and the libraries, and the tests must not see
OUTSIDE = (
    "LAUNCHER|NPROC|MODEL|DATA|TRAIN|EVAL|OUTPUT_DIR|DS_CONFIG|LOG_DIR|LOG_FILE|BACKGROUND|HOSTFILE|NNODES|NODE_RANK"
    "|MASTER_ADDR|MASTER_PORT|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_SIZE|LOCAL_WORLD_SIZE|TENSORBOARD_LOGGING_DIR"
    "|(ACCELERATE|OPENAI|WANDB|SWANLAB|TRANSFORMERS|PET)_.*"
)
for name in [name for name in os.environ if re.fullmatch(OUTSIDE, name)]:
    del os.environ[name]

# Before torch and deepspeed are imported: tests run on CPU, on any machine, unless those of tests/cuda are asked for.
if os.environ.get("DFT_TEST_DEVICE") == "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one GPU
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are interpreted, if the package is there
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
CACHES = tempfile.mkdtemp(prefix="dft-tests-")  # of this session: nothing is from another one, or another processor
os.environ["HF_DATASETS_CACHE"] = f"{CACHES}/datasets"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{CACHES}/inductor"
os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).parent.parent / ".torch_extensions"))

import datasets  # noqa: E402
import transformers  # noqa: E402
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, TrainingArguments  # noqa: E402

from dft.config.loss import LossConfig  # noqa: E402
from dft.config.metrics import MetricsConfig  # noqa: E402
from dft_trainer import DFTTrainer  # noqa: E402
from dist_logger import ROOT_NAME  # noqa: E402
from examples.make_example_data import dialogues_zh, facts_en, reasoning_en, tools_en  # noqa: E402
from examples.make_tiny_model import make_model, make_tokenizer, strings  # noqa: E402
from tests.helpers import rows, run, tiny_run, write_jsonl  # noqa: E402

SETTINGS = [f.name for config in (LossConfig, MetricsConfig) for f in fields(config)]

# Examples are the same in every run, and may take as long as a slow machine needs.
hypothesis.settings.register_profile("tests", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHES, ignore_errors=True)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What the program sets for libraries, or a test for the program, doesn't outlive the test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Handlers and progress bars that a program has set up don't outlive the test, whose records caplog then sees."""
    yield
    logger = logging.getLogger(ROOT_NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 600 tokens without a chat template."""
    conversations = facts_en()[:40] + dialogues_zh()[:20] + tools_en()[:4] + reasoning_en()[:20]
    return make_tokenizer(strings(conversations), vocab_size=600)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny model, for this test alone."""
    return trained_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Directory of a random model of two layers, with its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    trained_tokenizer().save_pretrained(directory)
    make_model(600, hidden_size=32, num_layers=2).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory) -> Path:
    """A file of 40 conversations of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    return write_jsonl(path, facts_en()[:16] + dialogues_zh()[:16] + tools_en()[:8])


@pytest.fixture(scope="session")
def train_in(tiny_model, chat_file) -> Callable[..., subprocess.CompletedProcess]:
    """Runs scripts/train.sh on the tiny model and the chat file, two steps in float32 unless told otherwise.

    Called with a directory, which gets the output in `out` and the log file in `logs`; then flags.
    """

    def start(directory: Path, *flags, expect: int = 0, **env: str) -> subprocess.CompletedProcess:
        defaults = {"LAUNCHER": "python", "NPROC": "2", "LOG_DIR": str(directory / "logs")}
        settings = tiny_run(tiny_model, chat_file, directory / "out")
        result = run(["bash", "scripts/train.sh", *settings, *flags], **{**defaults, **env})
        assert result.returncode == expect, result.stdout[-6000:]
        return result

    return start


@pytest.fixture
def train(train_in, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """The same in the directory of the test."""
    return partial(train_in, tmp_path)


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """A trainer on a small model, with plain TrainingArguments, as a notebook would make it."""

    def make(model=None, **settings) -> DFTTrainer:
        names = {*inspect.signature(DFTTrainer.__init__).parameters, *SETTINGS, "compute_loss_func"}
        names |= {"processing_class", "train_dataset", "made_with", "stages", "answers", "optimizers"}
        own = {name: settings.pop(name) for name in names if name in settings}
        args = TrainingArguments(
            report_to="none",
            **{
                "output_dir": str(tmp_path),
                "use_cpu": True,
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
            eval_dataset=rows(11, seed=1),
            **{"train_dataset": rows(16), **own},
        )

    return make
