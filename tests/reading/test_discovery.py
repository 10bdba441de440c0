"""Directories and globs: what is entered, what is skipped, and that nothing is left out in silence."""

import logging
import os
from pathlib import Path

import pytest

from dft.errors import UserError
from dft.reading import walk
from dft.reading.discovery import find_data_files


@pytest.fixture
def found(tmp_path, caplog):
    """The files that patterns below the test's directory name, as paths below it, and the log of finding them."""
    caplog.set_level(logging.INFO)

    def find(*patterns: str) -> tuple[list[str], str]:
        caplog.clear()
        files = find_data_files([str(tmp_path / pattern) for pattern in patterns], "data_files")
        return [str(Path(file.path).relative_to(tmp_path)) for file in files], caplog.text

    return find


def make(directory: Path, *names: str) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_linked_directories_and_files_are_entered(tmp_path, found):
    make(tmp_path, "elsewhere/deep/b.jsonl", "elsewhere/c.jsonl", "data/a.jsonl")
    link(tmp_path / "data/linked", tmp_path / "elsewhere/deep")
    link(tmp_path / "data/d.jsonl", "../elsewhere/c.jsonl")
    expected = ["data/a.jsonl", "data/d.jsonl", "data/linked/b.jsonl"]
    for pattern in ("data", "data/*", "data/**", "data/**/*.jsonl"):
        assert found(pattern) == (expected, ""), pattern


def test_what_is_reached_twice_is_read_once_by_its_own_path(tmp_path, found):
    make(tmp_path, "data/z/a.jsonl", "data/m.jsonl")
    link(tmp_path / "data/a", "z")
    link(tmp_path / "data/b.jsonl", "m.jsonl")
    for pattern in ("data", "data/*", "data/**", "data/**/*.jsonl"):
        files, log = found(pattern)
        assert files == ["data/m.jsonl", "data/z/a.jsonl"]
        assert "2 paths skipped, which lead to what is read already: " in log
        assert "a -> z" in log
        assert "b.jsonl -> m.jsonl" in log
    files, log = found("data", "data/a/a.jsonl", "data/m.jsonl")
    assert files == ["data/m.jsonl", "data/z/a.jsonl"]
    assert "--data_files names 2 files more than once; read once: " in log


def test_circles_of_links_end(tmp_path, found):
    make(tmp_path, "data/a/x.jsonl", "data/b/y.jsonl", "secret.jsonl")
    for place, target in {"data/self": ".", "data/a/up": "..", "data/b/out": "../..", "data/a/to_b": "../b"}.items():
        link(tmp_path / place, target)
    link(tmp_path / "data/b/to_a", tmp_path / "data/a")
    for pattern in ("data", "data/**", "data/**/*.jsonl"):
        files, log = found(pattern)
        assert files == ["data/a/x.jsonl", "data/b/y.jsonl"]
        assert "3 links not followed, as they lead to a directory that contains them: " in log
        assert "b/out -> ../.." in log


@pytest.mark.parametrize("target", ["gone.jsonl", "loop.jsonl"])
def test_broken_links_are_named(tmp_path, found, target):
    make(tmp_path, "data/a.jsonl")
    link(tmp_path / "data/loop.jsonl", target)
    for pattern in ("data", "data/*.jsonl", "data/**/*.jsonl"):
        files, log = found(pattern)
        assert files == ["data/a.jsonl"]
        assert "WARNING" in log
        assert f"1 broken link skipped: {'' if pattern == 'data' else tmp_path}" in log
        assert f"loop.jsonl -> {target}" in log
    with pytest.raises(UserError, match=f"loop.jsonl: a broken link, to {target}"):
        found("data/loop.jsonl")
    (tmp_path / "data/a.jsonl").unlink()
    with pytest.raises(UserError, match="data: no data file in this directory, only 1 broken link"):
        found("data")


HIDDEN = (".ipynb_checkpoints/a.jsonl", ".Trash/deep/a.jsonl", "._a.jsonl", "__MACOSX/._a.jsonl", "sub/.a.jsonl")


def test_hidden_files_and_directories_are_skipped_and_counted(tmp_path, found):
    make(tmp_path, *(f"data/{name}" for name in HIDDEN), "data/a.jsonl", "data/sub/b.jsonl")
    for pattern in ("data", "data/**/*.jsonl", "dat*"):
        files, log = found(pattern)
        assert files == ["data/a.jsonl", "data/sub/b.jsonl"]
        assert "5 hidden entries skipped" in log
        assert ".Trash" in log
        assert "WARNING" not in log


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_path_that_is_given_is_read(tmp_path, found, name):
    make(tmp_path, f"data/{name}")
    assert found(f"data/{name}")[0] == [f"data/{name}"]
    if not Path(name).name.startswith("."):
        assert found(f"data/{Path(name).parent}")[0] == [f"data/{name}"]
    with pytest.raises(UserError, match="no data file in this directory, only 1 hidden entry"):
        found("data")


def test_globs_skip_what_macos_adds_to_archives(tmp_path, found):
    make(tmp_path, "data/a.jsonl", "data/.b.jsonl", "data/._a.jsonl", "data/__MACOSX/c.jsonl")
    assert found("data/*.jsonl") == (["data/a.jsonl"], "")
    files, log = found("data/[_a-z]*", "data/.*.jsonl")
    assert files == ["data/a.jsonl", "data/.b.jsonl"]
    assert "._a.jsonl" in log
    assert "__MACOSX" in log
    assert found("data/__MACOSX/*.jsonl")[0] == ["data/__MACOSX/c.jsonl"]


def test_globs_enter_the_directories_that_they_match(tmp_path, found):
    make(tmp_path, "data/2024/a.jsonl", "data/2025/deep/b.jsonl", "data/other/c.jsonl")
    assert found("data/20*")[0] == ["data/2024/a.jsonl", "data/2025/deep/b.jsonl"]
    assert found("**/deep")[0] == ["data/2025/deep/b.jsonl"]
    assert found("**/2025/**/*.jsonl")[0] == ["data/2025/deep/b.jsonl"]


def test_double_stars_are_relative_as_they_are_written(tmp_path, monkeypatch):
    make(tmp_path, "a.jsonl", "deep/[b]/c.jsonl")
    monkeypatch.chdir(tmp_path)
    for pattern in ("**/*.jsonl", "**"):
        assert [file.path for file in find_data_files([pattern], "data_files")] == ["a.jsonl", "deep/[b]/c.jsonl"]
    assert [file.path for file in find_data_files(["deep/**/*.jsonl"], "data_files")] == ["deep/[b]/c.jsonl"]


def test_a_directory_that_cannot_be_read_stops_the_run(tmp_path, found, monkeypatch):
    make(tmp_path, "data/a.jsonl", "data/locked/b.jsonl")
    listdir = os.listdir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(walk.os, "listdir", refuse)
    with pytest.raises(UserError, match="data/locked: this directory can't be read"):
        found("data")


def test_home_and_variables_in_a_path(tmp_path, monkeypatch):
    make(tmp_path, "chats/a.jsonl", "$DATA.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "chats")
    expected = str(tmp_path / "chats" / "a.jsonl")
    for pattern in ("~/chats", "~/chats/*.jsonl", "$HOME/$DATA", "${HOME}/chats/a.jsonl#3"):
        assert [file.path for file in find_data_files([pattern], "data_files")] == [expected]
    literal = str(tmp_path / "$DATA.jsonl")
    assert [file.path for file in find_data_files([literal], "data_files")] == [literal]
    with pytest.raises(UserError, match=r"--data_files \$NOT_SET/a.jsonl: the environment variable NOT_SET isn't set"):
        find_data_files(["$NOT_SET/a.jsonl"], "data_files")
