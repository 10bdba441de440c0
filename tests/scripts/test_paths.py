"""Paths on the command lines of the scripts."""

import argparse

import pytest

from dft.files import path_argument
from tests.helpers import ROOT


def test_home_and_variables_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NO_SUCH", raising=False)
    assert path_argument("~/a") == path_argument("$HOME/a") == tmp_path / "a"
    with pytest.raises(argparse.ArgumentTypeError, match="the environment variable NO_SUCH isn't set"):
        path_argument("$NO_SUCH/a")


@pytest.mark.parametrize(
    "name", ["chat", "evaluate", "export", "judge", "plot_runs", "prepare_pairs", "reshape_checkpoint"]
)
def test_every_script_reads_its_paths_so(name):
    text = (ROOT / "scripts" / f"{name}.py").read_text()
    assert "type=path_argument" in text
    assert "type=Path" not in text
