"""scripts/train.sh under every launcher: on all formats, from the cache, with trackers, in background, ended."""

import gzip
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import ROOT, TIMEOUT, environment_of, read_log, tiny_run, wait_until

pytestmark = pytest.mark.launch

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": 0.5}]
ROWS = {
    "sharegpt.jsonl.gz": [{"conversations": TURNS}] * 3,
    "alpaca.json": [{"instruction": f"Say {i}", "input": "", "output": str(i)} for i in range(9)],
    "prompts.jsonl": [{"prompt": f"After {i}?", "completion": str(i + 1)} for i in range(9)],
}


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory) -> list:
    """Files of several formats, weighted, without duplicates, and a cache for their tokens."""
    directory = tmp_path_factory.mktemp("formats")
    for name, rows in ROWS.items():
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        data = text.encode()
        (directory / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return [
        *("--data_files", directory / "sharegpt.jsonl.gz", directory / "alpaca.json", f"{directory}/prompts.jsonl#5"),
        *("--data_weights", 2, 1, 1, "--dedup", "True", "--data_cache_dir", directory / "cache"),
        *("--eval_generations", 3, "--eval_max_new_tokens", 5),
    ]


@pytest.fixture(scope="module")
def runs(train_in, data_flags, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """A run under each launcher; all train on the same files, of which the first has kept the tokens.

    The first is under DDP, the second under FSDP2, the third has trackers. Each has its `processes`, its `directory`,
    and its `output` on the terminal.
    """
    trackers = ("--report_to", "swanlab,wandb", "tensorboard", "mlflow", "--project", "trial", "--run_name", "first")
    found = {}
    for launcher, processes, flags, env in (
        ("torchrun", 2, (), {"DS_CONFIG": ""}),
        ("accelerate", 2, ("--fsdp", "full_shard"), {"DS_CONFIG": ""}),
        ("python", 1, trackers, {"SWANLAB_API_KEY": "", "WANDB_API_KEY": ""}),
    ):
        directory = tmp_path_factory.mktemp(launcher)
        env |= {"LAUNCHER": launcher, "NPROC": processes, "HOME": directory, "OUTPUT_DIR": directory / "unused"}
        result = train_in(directory, *data_flags, *flags, **env)
        found[launcher] = SimpleNamespace(processes=processes, directory=directory, output=result.stdout)
    return found


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "python"])
def test_launchers_start_their_processes_and_write_a_log_file(runs, launcher):
    """That all give the loss of the deepspeed launcher is for test_invariance.py."""
    run = runs[launcher]
    assert f"[RANK 0/{run.processes}]" in run.output
    assert "Log file: " in run.output
    log = next((run.directory / "logs").glob("train_*.log")).read_text()
    assert "Done: 2 steps" in log
    assert log.startswith("Command: ")


def test_every_format_is_trained_on_and_reported(runs):
    report = json.loads((runs["torchrun"].directory / "out" / "data_report.json").read_text())
    assert [(entry["format"], entry["kept"]) for entry in report["files"]] == [
        ("sharegpt", 1),
        ("alpaca", 9),
        ("prompt_completion", 5),
    ]
    assert report["total"]["rejected"] == {"duplicate": 2}


def test_a_second_run_trains_on_the_same_rows_from_the_cache(runs):
    first, second = runs["torchrun"], runs["accelerate"]
    assert "Tokenized data kept in" in first.output
    assert "Tokenized data from the cache" in second.output
    losses, again = (
        [record["loss"] for record in read_log(run.directory / "out") if "loss" in record] for run in (first, second)
    )
    assert len(losses) == 2
    assert again == pytest.approx(losses, rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)  # other rows have another loss


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "python"])
def test_evaluations_ask_the_model(runs, launcher):
    """Under DDP, FSDP2 and in one process. One row is held out, so that a process has no prompt of its own."""
    out = runs[launcher].directory / "out"
    (answer,) = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert (answer["step"], answer["scorer"]) == (2, "last_number")
    record = next(record for record in read_log(out) if "eval_answers/score" in record)
    assert record["eval_answers/mean_tokens"] == answer["tokens"] <= 5


def test_trackers_without_keys_write_to_disk(runs):
    out, output = runs["python"].directory / "out", runs["python"].output
    for sign in ("swanlab sync", "wandb sync"):
        assert sign in output
    assert list((out / "swanlog").glob("run-*"))
    assert list((out / "wandb").glob("offline-run-*"))
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    assert set(json.loads((out / "tracker_ids.json").read_text())) == {"swanlab", "wandb", "tensorboard"}
    recorded = b"".join(path.read_bytes() for path in (out / "wandb").glob("offline-run-*/*.wandb"))
    assert b"git_commit" in recorded
    assert b"alpaca.json" in recorded


def test_a_tracker_without_its_package_is_dropped(runs):
    assert "--report_to mlflow: it can't start, going on without it" in runs["python"].output


def test_records_are_lines_on_the_terminal(runs):
    assert "step 2/2  loss " in runs["python"].output
    assert "{'loss'" not in runs["python"].output


# ---- the end of the script ----------------------------------------------------------------------


def test_background_returns_at_once(train, tmp_path):
    log = tmp_path / "background.log"
    result = train(BACKGROUND="1", LOG_FILE=log)
    assert not (tmp_path / "out" / "model.safetensors").exists()  # the run goes on without the script
    assert f"tail -f {log}" in result.stdout
    wait_until(lambda: log.exists() and "Done: 2 steps" in log.read_text())


def test_the_lock_of_a_killed_build_stops_no_run(train, tmp_path):
    """DeepSpeed would wait for it to go away."""
    extensions = tmp_path / "extensions"
    operator = "deepspeed_shm_comm"
    shutil.copytree(Path(os.environ["TORCH_EXTENSIONS_DIR"]) / operator, extensions / operator)
    lock = extensions / operator / "lock"
    lock.touch()
    result = train("--eval_strategy", "no", LAUNCHER="deepspeed", NPROC="1", TORCH_EXTENSIONS_DIR=extensions)
    assert f"Removed {lock}, which a build that was killed had left behind" in result.stdout
    assert "Done: 2 steps" in result.stdout


def command_lines() -> dict[int, str]:
    """Those of all processes of this machine, by their numbers."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
    return lines


def test_a_signal_to_one_rank_ends_all_of_them_with_a_checkpoint(tiny_model, chat_file, tmp_path):
    command = ["bash", "scripts/train.sh", *tiny_run(tiny_model, chat_file, tmp_path / "out"), "--max_steps", 100000]
    env = environment_of(LAUNCHER="deepspeed", NPROC=2, LOG_FILE=tmp_path / "log")
    words = [*map(str, command), "--save_strategy", "no"]
    script = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "out" / "train_log.jsonl"
    wait_until(
        lambda: log.exists() and log.read_text(),
        failed=lambda: script.poll() is not None and (tmp_path / "log").read_text()[-3000:],
    )
    mine = {pid: line for pid, line in command_lines().items() if str(tmp_path) in line}
    (second,) = [pid for pid, line in mine.items() if "train_dft.py --local_rank=1" in line]
    os.kill(second, signal.SIGTERM)
    assert script.wait(timeout=TIMEOUT) == 143
    assert not [line for line in command_lines().values() if "train_dft.py" in line and str(tmp_path) in line]
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"The checkpoint is {checkpoint}; go on with" in (tmp_path / "log").read_text()
    assert not (tmp_path / "out" / "model.safetensors").exists()
