"""DeepSpeed's operators are built before they are needed, and no lock of a killed build stops a run."""

import json
import os
import time

import pytest

from dft import operators
from dft.operators import needed_operators, read_config, remove_stale_locks
from tests.helpers import ROOT

OFFLOAD = {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("config", "is_cpu", "expected"),
    [
        ({}, True, ["deepspeed_shm_comm"]),
        ({}, False, []),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, False, []),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD}}, True, ["deepspeed_shm_comm", "cpu_adam"]),
        ({"zero_optimization": {"offload_optimizer": OFFLOAD}, "zero_force_ds_cpu_optimizer": False}, False, []),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, False, ["async_io"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, False, ["cpu_adam", "async_io"]),
        ({"zero_optimization": {"offload_optimizer": None}}, False, []),
    ],
)
def test_what_a_configuration_needs(config, is_cpu, expected):
    assert needed_operators(config, is_cpu) == expected


def test_the_projects_own_configurations():
    needed = {path.stem: needed_operators(read_config(path), False) for path in (ROOT / "ds_config").glob("*.json")}
    adam = ["cpu_adam"]
    offloads = {"zero2_offload": adam, "zero3_offload_optimizer": adam, "zero3_offload": adam}
    assert needed == {"zero1": [], "zero2": [], "zero3": [], **offloads}


@pytest.mark.parametrize(("accelerator", "expected"), [("cpu", ["deepspeed_shm_comm"]), ("cuda", []), (None, [])])
def test_a_run_on_gpus_builds_nothing_for_processors(monkeypatch, tmp_path, accelerator, expected):
    """DS_ACCELERATOR says where a run is; scripts set it for GPUs too."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["operators", str(ROOT / "ds_config" / "zero3.json")])
    if accelerator is None:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    else:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    built: list[str] = []
    monkeypatch.setattr(operators, "build", built.append)
    operators.main()
    assert built == expected


@pytest.mark.parametrize("text", ["[]", "{", None])
def test_what_is_no_configuration_is_left_to_the_program(tmp_path, text):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    assert read_config(path) == {}


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def test_a_lock_that_no_process_has_open_is_removed(lock):
    with open(lock):
        assert remove_stale_locks(lock.parents[1]) == []
        assert lock.exists()
    assert remove_stale_locks(lock.parents[1]) == [lock]
    assert not lock.exists()


def test_on_a_network_a_young_lock_may_be_another_machines(lock, monkeypatch):
    monkeypatch.setattr(operators, "_file_system", lambda directory: "nfs4")
    assert remove_stale_locks(lock.parents[1]) == []
    long_ago = time.time() - 2 * operators.LONGEST_BUILD
    os.utime(lock, (long_ago, long_ago))
    assert remove_stale_locks(lock.parents[1]) == [lock]


def test_the_file_system_is_that_of_the_innermost_mount():
    assert operators._file_system(ROOT / "no such directory") == operators._file_system(ROOT) != ""
    assert operators._file_system(operators.Path("/proc/self")) == "proc"


def test_only_what_is_missing_is_built(tmp_path, monkeypatch, capsys):
    built = []
    monkeypatch.setattr(operators, "build", built.append)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"offload_optimizer": OFFLOAD}}))
    monkeypatch.setattr("sys.argv", ["operators", str(config)])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    operators.main()
    assert built == ["cpu_adam"]
    assert capsys.readouterr().out == "Building DeepSpeed's operator cpu_adam (a minute or two, once)\n"
