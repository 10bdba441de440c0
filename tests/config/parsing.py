"""What the tests of flags share."""

from typing import Any

import pytest

from dft.config.command_line import Settings, parse_args
from dft.errors import UserError

NEEDED = ["--model_name_or_path", "m", "--data_files", "d.jsonl", "--output_dir", "out"]


def parse(*flags: Any) -> Settings:
    """The settings of a command line with these flags, and those that are always needed."""
    return parse_args([*NEEDED, *map(str, flags)])


def assert_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*flags)
    assert message in str(caught.value)
