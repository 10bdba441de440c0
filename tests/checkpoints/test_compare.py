"""A checkpoint and the run that goes on from it: every difference is listed, and those that matter are refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dft.checkpoints.compare import check_loadable, compare_facts
from dft.checkpoints.manifest import write_manifest
from dft.errors import UserError
from dft.parallel.agreement import versions


def checkpoint_of(directory: Path, then: dict, of_versions: dict | None = None) -> Path:
    """A checkpoint that was made with this."""
    path = directory / "checkpoint-3"
    path.mkdir(exist_ok=True)
    content = {"made_with": then, "versions": versions() if of_versions is None else of_versions, "files": {}}
    write_manifest(path / "manifest.json", content)
    return path


def listed(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("  ")]


def test_every_difference_is_listed_with_the_remedy(tmp_path):
    checkpoint = checkpoint_of(tmp_path, {"training_rows": 64, "dft_alpha": 1.0, "data_seed": 42, "gone": 1})
    now = {"training_rows": 104, "dft_alpha": 0.5, "data_seed": 42, "new": 2}
    with pytest.raises(UserError) as caught:
        compare_facts(checkpoint, now, go_on=False)
    assert listed(str(caught.value)) == [
        "  training_rows: checkpoint 64, now 104",
        "  dft_alpha: checkpoint 1.0, now 0.5",
    ]
    assert "--resume_anyway True" in str(caught.value)
    assert f"--model_name_or_path {tmp_path}/checkpoint-3" in str(caught.value)
    assert "follow the flags" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "follows"),
    [
        ("learning_rate", "the learning rate and its schedule follow the flags of this run"),
        ("lr_scheduler_type", "the learning rate and its schedule follow the flags of this run"),
        ("warmup_steps", "the learning rate and its schedule follow the flags of this run"),
        ("weight_decay", "the optimizer keeps the settings of the checkpoint"),
        ("rows_per_step", None),
    ],
)
def test_what_changes_the_result_is_refused_and_what_happens_otherwise_is_said(tmp_path, caplog, name, follows):
    checkpoint = checkpoint_of(tmp_path, {name: 2, "seed": 1})
    with pytest.raises(UserError, match=f"{name}: checkpoint 2, now 3") as caught:
        compare_facts(checkpoint, {name: 3, "seed": 1}, go_on=False)
    compare_facts(checkpoint, {name: 3, "seed": 1}, go_on=True)
    for text in (str(caught.value), caplog.text):
        assert (follows or "keeps the settings") in text or follows is None
        assert ("; the" in text) == (follows is not None)


def test_what_does_not_change_the_result_is_said(tmp_path, caplog):
    then = {"seed": 1, "max_steps": 4, "num_train_epochs": None, "world_size": 1, "training_rows": 5}
    checkpoint = checkpoint_of(tmp_path, then, versions() | {"torch": "1.0"})
    compare_facts(checkpoint, then | {"seed": 2, "world_size": 2}, go_on=False)
    ours = f"  torch: checkpoint 1.0, now {versions()['torch']}"
    assert listed(caplog.text) == ["  seed: checkpoint 1, now 2", "  world_size: checkpoint 1, now 2", ours]
    assert "new length" not in caplog.text
    caplog.clear()
    compare_facts(checkpoint, then | {"max_steps": 6}, go_on=False)
    assert listed(caplog.text) == ["  max_steps: checkpoint 4, now 6", ours]
    assert "the learning rate is that of the new length" in caplog.text


def test_nothing_is_said_where_nothing_differs(tmp_path, caplog):
    compare_facts(checkpoint_of(tmp_path, {"seed": 1}), {"seed": 1}, go_on=False)
    assert not caplog.text


def test_older_checkpoints_tell_in_their_own_file_or_not_at_all(tmp_path, caplog):
    caplog.set_level("INFO")
    compare_facts(tmp_path, {"training_rows": 1}, go_on=False)
    assert "doesn't say what it was made with" in caplog.text
    (tmp_path / "made_with.json").write_text('{"training_rows": 2}')
    with pytest.raises(UserError, match="training_rows: checkpoint 2, now 1"):
        compare_facts(tmp_path, {"training_rows": 1}, go_on=False)
    (tmp_path / "made_with.json").write_text('{"training')
    with pytest.raises(UserError, match="what it was made with can't be read"):
        compare_facts(tmp_path, {"training_rows": 1}, go_on=False)


# ---- what can't be loaded at all ----------------------------------------------------------------

ZERO3 = {"engine": "deepspeed", "zero_stage": 3, "world_size": 2}
DDP = {"engine": "torch", "zero_stage": None, "world_size": 2}


def run_of(engine: str, zero_stage: int | None, world_size: int) -> SimpleNamespace:
    plugin = SimpleNamespace(zero_stage=zero_stage) if engine == "deepspeed" else None
    fsdp = {"state_dict_type": "FULL_STATE_DICT"} if engine == "fsdp" else None
    return SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin_args=fsdp, world_size=world_size)


@pytest.mark.parametrize(
    ("then", "changes", "line"),
    [
        (ZERO3, {}, None),
        (ZERO3, {"world_size": 1}, "world_size: checkpoint 2, now 1"),
        (ZERO3, {"zero_stage": 2}, "zero_stage: checkpoint 3, now 2"),
        (ZERO3, {"zero_stage": 0}, "zero_stage: checkpoint 3, now 0"),
        (ZERO3, DDP, "engine: checkpoint deepspeed, now torch"),
        (DDP, ZERO3, "engine: checkpoint torch, now deepspeed"),
        (DDP, {"engine": "fsdp"}, "engine: checkpoint torch, now fsdp"),
        (DDP, {"world_size": 1}, None),  # each process has all that it needs
    ],
)
def test_another_engine_or_number_of_parts_is_refused_whatever_is_asked_for(tmp_path, then, changes, line):
    checkpoint = checkpoint_of(tmp_path, then)
    now = run_of(**then | changes)
    if line is None:
        check_loadable(checkpoint, now)
        return
    with pytest.raises(UserError, match=line) as caught:
        check_loadable(checkpoint, now)
    is_command_named = f"python scripts/reshape_checkpoint.py {checkpoint}" in str(caught.value)
    assert is_command_named == (then == ZERO3 and "engine" not in changes and changes.get("zero_stage") != 0)


def test_a_reshaped_checkpoint_is_for_any_number_of_processes_and_any_stage_with_parts(tmp_path):
    checkpoint = checkpoint_of(tmp_path, {"engine": "deepspeed"})
    (checkpoint / "global_step3_universal").mkdir()
    (checkpoint / "latest_universal").touch()
    for stage in (1, 2, 3):
        check_loadable(checkpoint, run_of("deepspeed", stage, 7))
    for engine, stage, line in [
        ("torch", None, "engine: checkpoint deepspeed, now torch"),
        ("deepspeed", 0, "zero_stage: checkpoint 1, 2 or 3, now 0"),
    ]:
        with pytest.raises(UserError, match=line) as caught:
            check_loadable(checkpoint, run_of(engine, stage, 1))
        assert "reshape_checkpoint.py" not in str(caught.value)


@pytest.mark.parametrize("told", [None, {"zero_stage": 3, "world_size": 2}])
def test_older_checkpoints_of_deepspeed_are_known_by_their_parts(tmp_path, told):
    (tmp_path / "global_step3").mkdir()
    if told:
        (tmp_path / "made_with.json").write_text(json.dumps(told))
    check_loadable(tmp_path, run_of(**ZERO3))
    with pytest.raises(UserError, match="engine: checkpoint deepspeed, now torch"):
        check_loadable(tmp_path, run_of(**DDP))
