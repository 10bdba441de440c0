"""Gives lm-evaluation-harness the rows of a JSONL file that lies beside the task's YAML."""

import json
from pathlib import Path

from datasets import Dataset


def load(file: str, **metadata: object) -> dict[str, Dataset]:
    """The rows of a file of this directory as the split "test". The harness passes its metadata too; it isn't used."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
