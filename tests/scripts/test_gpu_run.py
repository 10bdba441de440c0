"""The measurements for GPU machines: all of them run here in tiny sizes, so that they still do when there is a GPU."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import correctness, loss_head, quickstart, step, table, wheels
from benchmarks.gpu.part import Part, Skipped, results_of
from tests.helpers import ROOT, run

PARTS = ("facts", "correctness", "loss_head", "step", "memory", "quickstart")
RUN = ROOT / "benchmarks" / "gpu" / "run.sh"


def start(out: Path, *options, **env: str) -> subprocess.CompletedProcess:
    # an hour: limits are for GPU machines, and this one may be slow
    return run(["bash", RUN, out, "--tiny", "--minutes", 60, *options], **env)


@pytest.fixture(scope="session")
def tiny_gpu_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One run of all parts, and its directory."""
    out = tmp_path_factory.mktemp("gpu")
    return out, start(out)


def results(out: Path) -> dict[str, dict]:
    return {part: json.loads((out / f"{part}.json").read_text()) for part in PARTS}


def numbers_in(value: object) -> list[float]:
    """All numbers inside a JSON value."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers_in(inner)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.launch
def test_every_part_leaves_numbers_or_says_why_not(tiny_gpu_run):
    out, done = tiny_gpu_run
    assert done.returncode == 0, done.stdout[-3000:] + "".join(p.read_text()[-2000:] for p in out.glob("*.log"))
    for part, result in results(out).items():
        assert (out / f"{part}.log").exists()
        if result["status"] == "skipped":
            assert result["reason"].startswith("skipped: ")
            assert len(result["reason"]) > len("skipped: ")
        else:
            assert (result["status"], result["reason"]) == ("done", "")
            assert all(number > 0 for number in numbers_in(result["headline"]))
            assert numbers_in(result["headline"])
    assert results(out)["correctness"]["status"] == "skipped"  # the tests see no GPU


@pytest.mark.launch
def test_the_last_line_is_json_with_every_part(tiny_gpu_run):
    out, done = tiny_gpu_run
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("failed") == []
    assert tuple(told) == PARTS
    assert told["facts"] == results(out)["facts"]["headline"]
    assert told["correctness"].startswith("skipped: ")
    text = (out / "results.md").read_text()
    assert all(f"## {part}" in text for part in PARTS)
    assert "ours, as the trainer uses it" in text


@pytest.mark.launch
def test_what_needs_cuda_says_so(tiny_gpu_run):
    found = results(tiny_gpu_run[0])
    assert found["facts"]["measurements"]["gpu"] == "skipped: no CUDA"
    assert found["step"]["headline"]["mfu"] == "skipped: no CUDA"
    assert found["step"]["measurements"]["tiny/ours_packed-compiled"] == "skipped: no CUDA"


@pytest.mark.launch
def test_every_way_of_the_loss_is_measured_or_missing_with_a_reason(tiny_gpu_run):
    measured = results(tiny_gpu_run[0])["loss_head"]["measurements"]
    assert list(measured) == loss_head.items(loss_head.TINY, loss_head.TINY_CHUNKS_MB)
    for item, value in measured.items():
        way = item.split(":")[0]
        if isinstance(value, str):
            assert value.startswith(("skipped: ", "failed: ")), value
            assert way in loss_head.PEERS, f"{way}: {value}"
        else:
            assert value["seconds"] > 0
            assert way == "products" or max(value["error_hidden"], value["error_weight"]) < 1e-4


@pytest.mark.launch
def test_a_step_trains(tiny_gpu_run):
    measured = results(tiny_gpu_run[0])["step"]["measurements"]
    assert list(measured) == step.items(("tiny",))
    for batching in ("packed", "padding_free"):
        way = measured[f"tiny/ours_{batching}"]
        assert way["padding"] == 0.0
        assert 0 < way["grad_norm_min"] <= way["grad_norm_max"]
        assert len(way["costs"]) > 5
        assert sum(cost["share"] for cost in way["costs"]) <= 1 + 1e-9


@pytest.mark.launch
def test_the_quickstart_trains_twice(tiny_gpu_run):
    measured = results(tiny_gpu_run[0])["quickstart"]["measurements"]
    assert list(measured["began"]) == ["1", "2", "3"]
    for name in ("base", "model"):
        assert measured[name]["steps"] == 2
        assert measured[name]["grad_norm_last"] > 0


@pytest.mark.launch
def test_a_part_that_fails_leaves_the_others_whole(tmp_path):
    """Here the first one can't write its result, because a directory is in its place."""
    (tmp_path / "facts.json" / "in_the_way").mkdir(parents=True)
    done = start(tmp_path, "--parts", "facts loss_head")
    assert done.returncode == 1, done.stdout
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["failed"] == ["facts"]
    assert told["facts"].startswith("failed: no result (IsADirectoryError), see facts.log")
    assert "Error" in (tmp_path / "facts.log").read_text()
    assert json.loads((tmp_path / "loss_head.json").read_text())["status"] == "done"
    assert told["loss_head"]


def test_unknown_arguments_are_refused(tmp_path):
    for options, message in ((["--fast"], "unknown argument --fast"), (["--parts", "x"], "no part is named x")):
        done = run(["bash", RUN, tmp_path / "out", *options])
        assert done.returncode == 2
        assert message in done.stdout


# ---- a part that is cut or whose worker dies ----------------------------------------------------


def test_a_part_that_is_cut_keeps_its_measurements(tmp_path):
    part = Part("facts", tmp_path, seconds=60, tiny=True)
    part.add("copy", {"gb_per_second": 2.5})
    part.headline(copy_gb_per_second=2.5)  # and then the process is killed
    result = table.result_of(tmp_path, "facts")
    assert (result["status"], result["reason"]) == ("failed", table.CUT)
    assert result["measurements"] == {"copy": {"gb_per_second": 2.5}}
    assert table.last_line([result]) == {"failed": ["facts"], "facts": {"copy_gb_per_second": 2.5}}
    assert "copy_gb_per_second 2.5; failed: it was cut" in table.describe([result])


WORKER = """
import os, sys, time
from benchmarks.gpu.part import Skipped, serve

def measure(item):
    if item == "dies":
        os._exit(3)
    if item == "hangs":
        time.sleep(600)
    if item == "raises":
        raise ValueError("no good")
    if item == "loses_the_device":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if item == "missing":
        raise Skipped("x is not installed")
    return {"process": os.getpid(), "seconds": float("nan")}

serve(sys.argv[2:], measure)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch) -> str:
    """The name of a module whose items behave as they are called."""
    (tmp_path / "odd_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return "odd_worker"


def test_a_worker_that_dies_or_hangs_costs_one_item(tmp_path, worker):
    part = Part("loss_head", tmp_path, seconds=600, tiny=True)
    items = ["a", "dies", "raises", "hangs", "missing", "loses_the_device", "b"]
    found = dict(results_of(part, worker, items, item_seconds=10))
    assert set(found) == set(items)
    assert found["raises"] == "failed: ValueError: no good"
    assert found["missing"] == "skipped: x is not installed"
    assert found["loses_the_device"].startswith("failed: RuntimeError: CUDA error")
    assert "its process ended with status 3, or took more than 10 s" in found["dies"]
    assert "its process ended with status -9, or took more than 10 s" in found["hangs"]
    assert found["a"]["process"] != found["b"]["process"]
    assert found["a"]["seconds"] == "nan"  # which JSON doesn't know


def test_a_worker_that_cannot_start_is_given_up(tmp_path):
    part = Part("loss_head", tmp_path, seconds=600, tiny=True)
    found = dict(results_of(part, "no_such_module", list("abcde"), item_seconds=10))
    assert list(found) == list("abcde")
    assert [value for value in found.values() if value == "failed: no worker could start"] == [found["d"], found["e"]]


def test_nothing_is_started_without_time(tmp_path, worker):
    part = Part("loss_head", tmp_path, seconds=0, tiny=True)
    assert dict(results_of(part, worker, ["a"], item_seconds=10)) == {"a": "skipped: no time left"}


@pytest.mark.parametrize(
    ("status", "passed", "reasons", "error", "message"),
    [
        (0, 0, ["no CUDA"], Skipped, "no CUDA"),
        (0, 0, [], Skipped, "no test ran"),
        (5, 0, [], Skipped, "no test with the mark"),
        (1, 3, [], RuntimeError, "1 tests failed"),
        (0, 3, ["no NCCL"], None, ""),
    ],
)
def test_tests_that_fail_make_the_part_fail(tmp_path, status, passed, reasons, error, message):
    part = Part("correctness", tmp_path, seconds=60, tiny=False)
    counts = {"passed": passed, "failed": int(status == 1), "skipped": 2}
    if error is None:
        correctness.judge(part, status, counts, reasons)
    else:
        with pytest.raises(error, match=message):
            correctness.judge(part, status, counts, reasons)


def test_counts_follow_the_output_of_pytest(tmp_path):
    counts = correctness.Counts(Part("correctness", tmp_path, seconds=60, tiny=False))
    for outcome in ("PASSED  [ 10%]", "FAILED", "ERROR", "SKIPPED (no NCCL)"):
        counts.read(f"tests/cuda/test_x.py::test_y[a b] {outcome}\n")
    counts.read("SKIPPED [1] tests/cuda/conftest.py:34: no NCCL\n")
    counts.read("FAILED tests/cuda/test_x.py::test_y - assert 0\n")  # of the summary
    counts.read("[gw3] [ 50%] PASSED tests/cuda/test_x.py::test_z[c d] \n")  # of tests side by side
    counts.read("[gw0] [100%] FAILED tests/cuda/test_x.py::test_z[e] \n")
    assert counts.outcomes == {"passed": 2, "failed": 3, "skipped": 1}
    assert counts.failures == ["tests/cuda/test_x.py::test_y[a b]"] * 2 + ["tests/cuda/test_x.py::test_z[e]"]
    assert counts.reasons == {"no NCCL"}


# ---- packing ------------------------------------------------------------------------------------


def test_squeezed_wheels_come_out_whole(tmp_path):
    wheel, packed, target = tmp_path / "x-1-py3-none-any.whl", tmp_path / "packed", tmp_path / "target"
    packed.mkdir()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/__init__.py", "value = 1\n" * 1000)
        file.writestr("x-1.dist-info/RECORD", "x/__init__.py,,\n")
    wheels.squeeze(wheel, packed / f"{wheel.name}.xz")
    (packed / "y-1-py3-none-any.whl").write_bytes(wheel.read_bytes())
    wheels.expand(packed, target)
    for name in (wheel.name, "y-1-py3-none-any.whl"):
        with zipfile.ZipFile(target / name) as found, zipfile.ZipFile(wheel) as before:
            assert {n: found.read(n) for n in found.namelist()} == {n: before.read(n) for n in before.namelist()}
    assert (packed / f"{wheel.name}.xz").stat().st_size < 1000


def test_every_packed_package_is_pinned():
    """pack.sh stops at a package without a tested version; this finds it without a network."""
    groups = re.search(r"(?s)\ngroups=\((.*?)\n\)", (ROOT / "benchmarks" / "gpu" / "pack.sh").read_text())[1]
    pins = (ROOT / "constraints.txt").read_text() + (ROOT / "pyproject.toml").read_text()
    names = [name for line in re.findall(r'"([^"]+)"', groups) for name in line.split()]
    assert len(names) > 20
    for name in names:
        assert "==" in name or re.search(rf'(?m)^(    ")?{name}==', pins), name


# ---- what is compared ---------------------------------------------------------------------------


def test_ratios_of_the_loss_head():
    case = loss_head.LARGE
    seconds = {"products": 0.040, "ours": 0.048, "liger": 0.192, "trl": 0.060, "ours_256": 0.07, "ours_2048": 0.045}
    found = {loss_head.item_of(way, case): {"seconds": value} for way, value in seconds.items()}
    found[loss_head.item_of("cut", case)] = "failed: OutOfMemoryError"
    assert loss_head.measured_of(loss_head.item_of("ours", case)) == ("ours", case)
    assert loss_head.compared(found, case) == {
        "ours_vs_products": pytest.approx(1.2),
        "ours_vs_fastest_peer": pytest.approx(0.8),
        "fastest_peer": "trl",
        "best_chunk_mb": 2048.0,
        "best_chunk_seconds": 0.045,
    }
    assert loss_head.compared({}, case) == {}


def test_compiled_steps_come_last():
    assert [item.endswith("-compiled") for item in step.items(("a", "b"))] == [False] * 12 + [True] * 4


def test_a_process_is_not_shared_with_ways_that_change_the_code():
    found = step.processes(step.items(("a", "b")))
    assert [item for process in found for item in process] == step.items(("a", "b"))
    assert max(map(len, found)) > 1
    for process in found:
        assert len(process) == 1 or not any("-" in item for item in process)


def test_ratios_of_the_step():
    found = {
        "0.6b/ours_packed": {"tokens_per_second": 120.0, "mfu": 0.5},
        "0.6b/ours_padding_free": {"tokens_per_second": 90.0, "mfu": 0.4},
        "0.6b/ours_packed-compiled": {"tokens_per_second": 150.0, "mfu": 0.6},
        "0.6b/ours_packed-liger": {"tokens_per_second": 180.0, "mfu": 0.7},
        "0.6b/trl_packed-liger": {"tokens_per_second": 120.0, "mfu": 0.5},
        "0.6b/trl_packed": {"tokens_per_second": 100.0, "mfu": 0.4},
        "0.6b/trl_padding_free": "failed: RuntimeError",
    }
    told = step.compared(found, "0.6b")
    assert told == {
        "best": "ours_packed",
        "tokens_per_second": 120.0,
        "mfu": 0.5,
        "vs_trl": 1.2,
        "compiled_vs_not": 1.25,
        "liger_vs_not": 1.5,
        "liger_vs_trl": 1.5,
    }
    missing = found | {"0.6b/trl_packed": "skipped: trl is not installed"}
    assert step.compared(missing, "0.6b")["vs_trl"] == "skipped: trl is not installed"
    assert step.compared({}, "0.6b") == {}


def test_the_quickstart_is_the_one_of_the_readme_without_installing():
    whole, text, tiny = quickstart.SCRIPT.read_text(), quickstart.script(False), quickstart.script(True)
    assert "setup.sh" in whole
    assert "setup.sh" not in text
    assert len(whole.splitlines()) - len(text.splitlines()) == 1
    assert tiny.count("--max_steps 2") == 2
    assert subprocess.run(["bash", "-n", "-c", tiny]).returncode == 0


def test_importing_a_part_needs_no_torch():
    """Parts are parents of workers; one that imports torch would cost seconds of each part's time."""
    code = "import sys, benchmarks.gpu.step, benchmarks.gpu.loss_head, benchmarks.gpu.table, benchmarks.gpu.quickstart"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)
