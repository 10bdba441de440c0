"""Gives lm-evaluation-harness the rows of a JSONL file that lies beside the task's YAML."""

import json
from pathlib import Path

from datasets import Dataset


def load(file: str, **metadata: object) -> dict[str, Dataset]:
    """Reads a file beside this one as the split "test".

    Args:
        file: its name, from the task's YAML.
        metadata: what else the harness passes; not used.
    """
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
