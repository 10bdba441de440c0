"""New directories of output and caches can be entered by this user alone, unless --shared_files says otherwise."""

import os
from pathlib import Path

import numpy as np
import pytest

from data_utils import prepare_data
from dft.chat.format import ChatFormat
from dft.config.command_line import parse_args
from dft.reference import store
from dft.tracking.tracker_checks import check_trackers
from tests.helpers import run, tiny_run
from train_dft import start_logging


@pytest.fixture(autouse=True)
def usual_umask():
    earlier = os.umask(0o022)
    yield
    os.umask(earlier)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("flags", "expected"), [((), 0o700), (("--shared_files", "True"), 0o755)])
def test_modes_of_new_directories(flags, expected, tiny_model, chat_file, tokenizer, tmp_path):
    places = [tmp_path / name for name in ("out", "out/logs", "cache", "out/runs")]
    words = [*tiny_run(tiny_model, chat_file, places[0]), "--logging_dir", places[1], "--data_cache_dir", places[2]]
    settings = parse_args([*map(str, words), "--report_to", "tensorboard", *flags])
    os.environ.pop("TENSORBOARD_LOGGING_DIR")
    start_logging(settings)
    check_trackers(settings.training, shared=settings.data.shared_files)
    prepare_data(settings.data, ChatFormat.of(tokenizer, settings.data), progress=False)
    assert [mode(path) for path in places] == [expected] * 4


def test_a_directory_that_is_there_keeps_its_mode(tiny_model, chat_file, tmp_path):
    (tmp_path / "out").mkdir()
    start_logging(parse_args([*map(str, tiny_run(tiny_model, chat_file, tmp_path / "out"))]))
    assert mode(tmp_path / "out") == 0o755


def test_log_probabilities_are_private(tmp_path):
    store.save([tmp_path / "reference"], "a.npz", (np.zeros(1), np.zeros(1)))
    assert mode(tmp_path / "reference") == 0o700


@pytest.mark.parametrize(("flags", "expected"), [((), 0o700), (("--shared_files=True",), 0o755)])
def test_the_launch_scripts_directory_of_logs(flags, expected, tmp_path):
    stub = tmp_path / "bin" / "deepspeed"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho 0 > "$DFT_RUN_DIR/status"\n')
    stub.chmod(0o755)
    settings = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "LOG_DIR": tmp_path / "logs", "NPROC": 1}
    result = run(["bash", "scripts/train.sh", *flags], DS_CONFIG="", **settings)
    assert result.returncode == 0, result.stdout
    assert mode(tmp_path / "logs") == expected
