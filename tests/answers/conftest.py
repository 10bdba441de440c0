"""The taught model, in memory and on the disk, and files of rows with its answers and with others."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.answers.lessons import ROWS, WRONG_ROWS, save_taught
from tests.conftest import trained_tokenizer
from tests.helpers import write_jsonl


@pytest.fixture(scope="session")
def taught(tmp_path_factory) -> Path:
    """The directory of a model that gives the answers of ROWS."""
    return save_taught(trained_tokenizer(), tmp_path_factory.mktemp("taught"))


@pytest.fixture
def taught_model(taught) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(taught).eval()


@pytest.fixture(scope="session")
def lessons(tmp_path_factory) -> dict[str, Path]:
    """Files of rows: "right" with the answers that the model gives, "wrong" with those of other questions."""
    directory = tmp_path_factory.mktemp("lessons")
    return {
        name: write_jsonl(directory / f"{name}.jsonl", rows) for name, rows in (("right", ROWS), ("wrong", WRONG_ROWS))
    }
