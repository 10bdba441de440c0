"""Parts of a checkpoint are joined, and what can't be is refused; that a run goes on is for tests/launch."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from dft.checkpoints.integrity import check_complete, check_whole
from dft.checkpoints.manifest import describe, list_files, read_manifests, write_manifest
from dft.checkpoints.reshape import MODEL_STATES, reshape
from dft.checkpoints.universal import complete_optimizer, is_universal, loaded_as_saved
from dft.errors import UserError
from dft.pickles import check_checkpoint
from scripts.reshape_checkpoint import main

SHAPES = ({"a.weight": (3, 5), "b.weight": (2, 2)}, {"a.bias": (7,)})  # of two groups of parameters
KEYS = ("fp32", "exp_avg", "exp_avg_sq")
GROUPS = [{"weight_decay": 0.5, "lr": 0.1, "params": [0]}, {"weight_decay": 0.0, "lr": 0.1, "params": [1]}]
RANKS = 2


@pytest.fixture
def whole() -> dict[str, dict[str, torch.Tensor]]:
    """What an optimizer holds of each parameter."""
    shapes = {name: shape for group in SHAPES for name, shape in group.items()}
    return {name: {key: torch.rand(shape) for key in KEYS} for name, shape in shapes.items()}


def stage_3_state(whole: dict, rank: int) -> dict:
    """The part of a rank, for which each parameter is padded and divided."""
    flat = []
    for group in SHAPES:
        parts = {key: [] for key in KEYS}
        for name in group:
            for key in KEYS:
                numbers = whole[name][key].flatten()
                size = -(-numbers.numel() // RANKS)
                padded = torch.cat([numbers, torch.full((size * RANKS - numbers.numel(),), torch.nan)])
                parts[key].append(padded[rank * size : (rank + 1) * size])
        flat.append({key: torch.cat(pieces) for key, pieces in parts.items()})
    moments = {i: {key: part[key] for key in KEYS[1:]} | {"step": torch.tensor(3.0)} for i, part in enumerate(flat)}
    optimizer = {"state": moments, "param_groups": GROUPS}
    return {"fp32_flat_groups": [part["fp32"] for part in flat], "optimizer_state_dict": optimizer, "zero_stage": 3}


def stage_2_state(whole: dict, rank: int) -> dict:
    """The part of a rank, for which the parameters of a group in a row are padded and divided."""
    weights, moments, places = [], {}, []
    for index, group in enumerate(SHAPES):
        numel = sum(whole[name]["fp32"].numel() for name in group)
        size = -(-numel // RANKS)
        start, end = rank * size, (rank + 1) * size
        held, first = {}, 0
        for name in group:
            last = first + whole[name]["fp32"].numel()
            if max(first, start) < min(last, end):
                at = max(first, start)
                held[name] = fragment_address(start=at - start, numel=min(last, end) - at)
            first = last
        flat = {key: torch.cat([whole[name][key].flatten() for name in group])[start:end] for key in KEYS}
        weights.append(flat["fp32"])
        moments[index] = {key: flat[key] for key in KEYS[1:]} | {"step": torch.tensor(3.0)}
        places.append(held)
    optimizer = {"state": moments, "param_groups": GROUPS}
    return {
        "single_partition_of_fp32_groups": weights,
        "base_optimizer_state": optimizer,
        "param_slice_mappings": places,
    }


def write_checkpoint(path: Path, whole: dict, stage: int) -> Path:
    """A checkpoint such as two ranks write under ZeRO."""
    parts = path / "global_step3"
    parts.mkdir(parents=True)
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in SHAPES]
    names = [*whole, "tied.weight"]
    model = {"param_shapes": shapes, "shared_params": {"tied.weight": "a.weight"}, "dp_world_size": RANKS}
    model |= {"module": dict.fromkeys(names, torch.empty(0)), "ds_version": "0.19.8", "global_steps": 3}
    for rank in range(RANKS):
        state = stage_3_state(whole, rank) if stage == 3 else stage_2_state(whole, rank)
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": {"dynamic_loss_scale": False} | state}, parts / name)
        torch.save({}, path / f"rng_state_{rank}.pth")
    torch.save(model, parts / MODEL_STATES[stage == 3])
    (path / "latest").write_text("global_step3")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "epoch": 0.5}))
    (path / "temperature.json").write_text('{"tau": 2.5}')
    (path / "zero_to_fp32.py").touch()
    describe_anew(path)
    return path


def describe_anew(checkpoint: Path) -> None:
    """Gives a checkpoint a manifest that holds for it."""
    facts = {"engine": "deepspeed", "zero_stage": 3, "world_size": RANKS, "rows_per_step": 8, "fsdp": None}
    files = {name: describe(checkpoint / name) for name in list_files(checkpoint) if name != "manifest.json"}
    about = {"step": 3, "made_with": facts, "versions": {"torch": "1.0"}, "files": files}
    write_manifest(checkpoint / "manifest.json", about)


@pytest.fixture
def checkpoint(tmp_path, whole) -> Path:
    return write_checkpoint(tmp_path / "run" / "checkpoint-3", whole, stage=3)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != "_lock"}


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_parts_of_all_ranks_are_joined(tmp_path, whole, stage):
    given = write_checkpoint(tmp_path / "run" / "checkpoint-3", whole, stage)
    assert reshape(given, tmp_path / "out") == 8
    zero = tmp_path / "out" / "global_step3_universal" / "zero"
    assert {path.name for path in zero.iterdir() if path.is_dir()} == whole.keys()
    for name, values in whole.items():
        for key in KEYS:
            assert torch.equal(torch.load(zero / name / f"{key}.pt")["param"], values[key]), (name, key)
        assert torch.load(zero / name / "step.pt") == 3


def test_the_result_is_a_whole_checkpoint_of_no_single_shape(checkpoint, capsys):
    before = contents(checkpoint)
    main([str(checkpoint)])
    output = checkpoint.with_name("checkpoint-3-reshaped")
    assert f"--resume_from_checkpoint {output}\nA step must train 8 rows" in capsys.readouterr().out
    assert contents(checkpoint) == before
    check_whole(output)
    check_complete(output)
    check_checkpoint(output)
    manifest = read_manifests(output)["manifest.json"]
    assert manifest["made_with"] == {"engine": "deepspeed", "rows_per_step": 8, "fsdp": None}
    assert (manifest["step"], manifest["versions"]) == (3, {"torch": "1.0"})
    assert {path.name for path in output.iterdir()} == {
        *("global_step3_universal", "latest_universal", "manifest.json"),
        *("rng_state_0.pth", "rng_state_1.pth", "temperature.json", "trainer_state.json"),
    }
    assert {path.name for path in checkpoint.parent.iterdir()} - {"_lock"} == {checkpoint.name, output.name}
    assert is_universal(output)
    assert not is_universal(checkpoint)


# ---- what is refused ----------------------------------------------------------------------------


def leave_parts(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "global_step3")


def damage(checkpoint: Path) -> None:
    path = checkpoint / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def lose_a_rank(checkpoint: Path) -> None:
    (checkpoint / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    describe_anew(checkpoint)


def lose_the_first_rank(checkpoint: Path) -> None:
    (checkpoint / "global_step3" / MODEL_STATES[1]).unlink()
    describe_anew(checkpoint)


def keep_whole(checkpoint: Path) -> None:
    """As ZeRO-0 does in float32."""
    for path in checkpoint.glob("global_step3/*_optim_states.pt"):
        path.unlink()
    describe_anew(checkpoint)


def forget_shapes(checkpoint: Path) -> None:
    """As ZeRO-0 does in 16 bits."""
    path = checkpoint / "global_step3" / MODEL_STATES[1]
    torch.save(torch.load(path, weights_only=False) | {"param_shapes": None}, path)
    describe_anew(checkpoint)


def add_tensor_parallel_part(checkpoint: Path) -> None:
    parts = checkpoint / "global_step3"
    given = parts / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shutil.copy(given, parts / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    describe_anew(checkpoint)


def change_optimizer(checkpoint: Path) -> None:
    for path in checkpoint.glob("global_step3/*_optim_states.pt"):
        state = torch.load(path, weights_only=False)
        for group in state["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
            del group["exp_avg_sq"]
        torch.save(state, path)
    describe_anew(checkpoint)


def freeze_weights(checkpoint: Path) -> None:
    path = checkpoint / "global_step3" / MODEL_STATES[1]
    state = torch.load(path, weights_only=False)
    state["module"]["frozen.weight"] = torch.empty(0)
    torch.save(state, path)
    describe_anew(checkpoint)


def rename_parameter(checkpoint: Path) -> None:
    path = checkpoint / "global_step3" / MODEL_STATES[1]
    state = torch.load(path, weights_only=False)
    state["param_shapes"][1] = {"../../a.bias": state["param_shapes"][1]["a.bias"]}
    state["module"] = {}
    torch.save(state, path)
    describe_anew(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "checkpoint-3: no such directory"),
        (leave_parts, "holds no parts that DeepSpeed has written"),
        (damage, "^/.*checkpoint-3: not a whole checkpoint\n.*rank_1_mp_rank_00_optim_states.pt: damaged"),
        (lose_a_rank, r"parts of ranks \[1\] aren't there"),
        (lose_the_first_rank, r"parts of ranks \[0\] aren't there"),
        (keep_whole, "only ZeRO-1, 2 and 3, without NVMe and tensor parallelism"),
        (forget_shapes, "only ZeRO-1, 2 and 3, without NVMe and tensor parallelism"),
        (add_tensor_parallel_part, "only ZeRO-1, 2 and 3, without NVMe and tensor parallelism"),
        (change_optimizer, "its optimizer holds exp_avg, fp32, step of a parameter"),
        (freeze_weights, "frozen.weight isn't trained"),
        (rename_parameter, r"\.\./\.\./a\.bias is the name of no parameter"),
    ],
)
def test_what_cant_be_reshaped_is_refused_and_nothing_is_written(checkpoint, change, message):
    change(checkpoint)
    before = contents(checkpoint.parent)
    with pytest.raises(UserError, match=message):
        main([str(checkpoint)])
    assert contents(checkpoint.parent) == before
    assert {path.name for path in checkpoint.parent.iterdir()} <= {checkpoint.name, "_lock"}


def test_an_output_that_exists_and_a_reshaped_checkpoint_are_refused(checkpoint, tmp_path):
    main([str(checkpoint), "--output", str(tmp_path / "out")])
    before = contents(tmp_path)
    with pytest.raises(UserError, match="--output .*out exists"):
        main([str(checkpoint), "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="is reshaped already"):
        main([str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    assert contents(tmp_path) == before


def test_without_room_nothing_is_written(checkpoint, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="there is no room for it, about 0.00 GiB"):
        main([str(checkpoint)])
    assert {path.name for path in checkpoint.parent.iterdir()} <= {checkpoint.name, "_lock"}


# ---- how it is loaded ---------------------------------------------------------------------------


def test_deepspeed_loads_each_checkpoint_in_its_format(checkpoint, tmp_path):
    main([str(checkpoint), "--output", str(tmp_path / "out")])
    engine = SimpleNamespace(_config=SimpleNamespace(load_universal_checkpoint=False))
    for directory, expected in ((tmp_path / "out", True), (checkpoint, False), (None, False)):
        with loaded_as_saved(directory):
            assert DeepSpeedEngine.load_universal_checkpoint(engine) == expected
        assert not DeepSpeedEngine.load_universal_checkpoint(engine)


def test_groups_keep_their_settings_and_parameters_their_steps(checkpoint, tmp_path):
    """DeepSpeed gives all groups the settings of the first, and all parameters one count."""
    main([str(checkpoint), "--output", str(tmp_path / "out")])
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW([{"params": [parameter]} for parameter in parameters], lr=0.1, weight_decay=0.5)
    count = torch.tensor(3.0)
    for parameter in parameters:
        optimizer.state[parameter] = {"step": count, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
        parameter.grad = torch.ones(2)
    complete_optimizer(optimizer, tmp_path / "out")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert [group["params"] for group in optimizer.param_groups] == [[parameter] for parameter in parameters]
    optimizer.step()
    assert [float(optimizer.state[parameter]["step"]) for parameter in parameters] == [4, 4]
