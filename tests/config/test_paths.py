"""Paths in flags, and the YAML file of flags."""

import pytest

from dft.config.command_line import PATHS, parse_values
from dft.config.listing import load_listing
from dft.errors import UserError

NEEDED = ["--model_name_or_path", "m", "--data_files", "d.jsonl"]
LISTS = ("data_files", "eval_data_files")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SUB", "deep")
    return tmp_path


def parsed(*argv: str) -> dict:
    return parse_values([*NEEDED, *argv], load_listing())


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("written", "meant"),
    [("~/a", "a"), ("$HOME/a", "a"), ("${HOME}/$SUB/a.b", "deep/a.b"), ("~/$SUB/*#5", "deep/*#5")],
)
def test_home_and_variables_are_replaced_in_every_path(home, name, written, meant):
    expected = [f"{home}/{meant}"] if name in LISTS else f"{home}/{meant}"
    assert parsed(f"--{name}", written)[name] == expected
    assert parsed(f"--{name}={written}")[name] == expected
    (home / "run.yaml").write_text(f"{name}: {written}\n")
    if name not in ("model_name_or_path", "data_files"):  # which the command line gives
        assert parsed("--config", "~/run.yaml")[name] == expected


def test_every_path_of_a_list_is_replaced(home):
    values = parsed("--data_files", "~/a", "b", "$HOME/c", "--eval_data_files", "~/d", "~/e")
    assert values["data_files"] == [f"{home}/a", "b", f"{home}/c"]
    assert values["eval_data_files"] == [f"{home}/d", f"{home}/e"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_name_or_path", "Qwen/Qwen3-8B"),
        ("deepspeed", '{"a": "$HOME"}'),
        ("output_dir", "a~b"),
        ("output_dir", "cost$"),
        ("resume_from_checkpoint", "last"),
        ("run_name", "~/$SUB"),  # no path
    ],
)
def test_what_is_no_path_or_has_nothing_to_replace_stays(home, name, value):
    assert parsed(f"--{name}", value)[name] == value


def test_a_path_that_exists_stays(home, monkeypatch):
    monkeypatch.chdir(home)
    for name in ("$SUB", "~"):
        (home / name).mkdir()
        assert parsed("--output_dir", name)["output_dir"] == name


@pytest.mark.parametrize("written", ["$NO_SUCH/a", "a/${NO_SUCH}"])
def test_a_variable_that_is_not_set_is_named(monkeypatch, written):
    monkeypatch.delenv("NO_SUCH", raising=False)
    for name in PATHS:
        with pytest.raises(UserError) as caught:
            parsed(f"--{name}", written)
        assert str(caught.value) == f"--{name} {written}: the environment variable NO_SUCH isn't set"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("seed: 1\nbf16: true\nseed: 2\n", ["3: seed is given twice, first in line 1"]),
        ("seed: 1\nseed: 1\nbf16: true\nbf16: true\n", ["2: seed is given twice", "4: bf16 is given twice"]),
        (
            "max_length: 9\n\nmodel_max_length: 8\n",
            ["3: model_max_length is given twice, first as max_length, another name of it, in line 1"],
        ),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", ["3: a is given twice, first in line 2"]),
        ("lr_scheduler_kwargs: {a: 1, a: 1}\n", ["1: a is given twice, first in line 1"]),
        ('"seed": 1\nseed: 2\n', ["2: seed is given twice, first in line 1"]),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path, text, messages):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(UserError) as caught:
        parsed("--config", str(config))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith(f"{config}:{message}")


def test_a_name_may_stand_in_two_mappings_and_override_what_is_merged(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("lr_scheduler_kwargs: &x\n  seed: 1\noptim_args: a\nseed: 3\n")
    assert parsed("--config", str(config))["seed"] == 3
    config.write_text("lr_scheduler_kwargs:\n  <<: {a: 1}\n  a: 2\n")
    assert parsed("--config", str(config))["lr_scheduler_kwargs"] == '{"a": 2}'
