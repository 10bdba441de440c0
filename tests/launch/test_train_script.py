"""The command that scripts/train.sh builds, seen by stand-ins for the launchers."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment_of, needs_full_disk, run

pytestmark = pytest.mark.launch


@pytest.fixture
def launched(tmp_path):
    """Runs train.sh with launchers that only say how they were called; returns that line."""
    for name in ("deepspeed", "torchrun", "accelerate"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(
            f'#!/bin/sh\necho "CALL {name} $* / visible=${{CUDA_VISIBLE_DEVICES-unset}}"\n'
            'echo 0 > "$DFT_RUN_DIR/status"\n'
        )
        stub.chmod(0o755)

    def call(*flags, **env) -> str:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        settings = {"LOG_DIR": str(tmp_path), "MASTER_PORT": "1234", "VIRTUAL_ENV": "none", "PATH": path, **env}
        result = run(["bash", "scripts/train.sh", *flags], **settings)
        assert result.returncode == 0, result.stdout
        return next(text for text in result.stdout.splitlines() if text.startswith("CALL "))

    return call


def test_gpus_are_chosen_for_deepspeed(launched):
    """It overwrites CUDA_VISIBLE_DEVICES, so it must be told by --include, and never by both."""
    call = launched(CUDA_VISIBLE_DEVICES="4,5,6")
    assert "--include localhost:4,5,6 train_dft.py" in call
    assert "--num_gpus" not in call
    assert call.endswith("visible=unset")
    assert "--include localhost:4,5 train_dft.py" in launched(CUDA_VISIBLE_DEVICES="4,5,6", NPROC="2")
    assert "--num_gpus 3" in launched(CUDA_VISIBLE_DEVICES="", NPROC="3")
    assert "--hostfile hosts" in launched(CUDA_VISIBLE_DEVICES="4,5", HOSTFILE="hosts")


def test_gpus_are_chosen_for_the_other_launchers(launched):
    call = launched(LAUNCHER="torchrun", CUDA_VISIBLE_DEVICES="4,5,6", NPROC="2")
    assert "--nproc-per-node 2" in call
    assert call.endswith("visible=4,5")


def test_nodes_are_told_to_every_launcher(launched):
    with socket.create_server(("127.0.0.1", 0)) as master:  # which is waited for
        port = master.getsockname()[1]
        nodes = {"NODE_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "0,1"}
        call = launched(LAUNCHER="torchrun", NNODES="8", **nodes)
        assert f"--nnodes 8 --node-rank 3 --master-addr 127.0.0.1 --master-port {port} --nproc-per-node 2" in call
        call = launched(LAUNCHER="accelerate", NNODES="8", **nodes)
        assert f"--num_machines 8 --machine_rank 3 --main_process_ip 127.0.0.1 --main_process_port {port}" in call
        assert "--num_processes 16" in call
        assert "--multi_gpu" in call
        call = launched(HOSTFILE="hosts", **nodes)
        assert f"--master_port {port} --hostfile hosts --no_ssh --node_rank 3 --master_addr 127.0.0.1" in call


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"LAUNCHER": "mpirun", "BACKGROUND": "1"}, "LAUNCHER=mpirun; it must be"),
        ({"NNODES": "2", "CUDA_VISIBLE_DEVICES": "0"}, "name the nodes in a HOSTFILE"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8a3f"}, "use LAUNCHER=torchrun for GPUs named by UUID"),
    ],
)
def test_mistakes_in_variables_are_status_2(env, message, tmp_path):
    result = run(["bash", "scripts/train.sh"], LOG_DIR=str(tmp_path), **env)
    assert result.returncode == 2
    assert message in result.stdout


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_variables_and_starts_nothing(flag, tmp_path):
    result = run(["bash", "scripts/train.sh", flag], LOG_DIR=str(tmp_path / "logs"))
    assert result.returncode == 0, result.stdout
    for words in ("    LAUNCHER     deepspeed (default)", "    HOSTFILE ", "python train_dft.py --help"):
        assert words in result.stdout
    assert "set -euo" not in result.stdout
    assert "Command: " not in result.stdout
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("finetune.sh", "TRAIN         training data"), ("quickstart.sh", "OUT is the output directory")],
)
def test_help_of_other_scripts_starts_nothing(name, words):
    result = run(["bash", f"scripts/{name}", "--help"], MODEL="")
    assert result.returncode == 0, result.stdout
    assert words in result.stdout
    assert "installed" not in result.stdout
    assert "set -euo" not in result.stdout


def test_the_quickstart_refuses_arguments():
    result = run(["bash", "scripts/quickstart.sh", "--dft_alpha", "1"])
    assert result.returncode == 2
    assert "takes no arguments, and got: --dft_alpha 1" in result.stdout


@pytest.fixture
def script(tmp_path):
    """Runs a shell command in which $TRAIN is train.sh, with a launcher that says much and ends with status 7."""
    stub = tmp_path / "torchrun"
    stub.write_text('#!/bin/sh\nsleep 0.5\nseq 30000\necho 7 > "$DFT_RUN_DIR/status"\nexit 7\n')
    stub.chmod(0o755)
    settings = {"LAUNCHER": "torchrun", "DS_CONFIG": "", "VIRTUAL_ENV": "none", "MASTER_PORT": "1234"}
    settings |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TRAIN": "bash scripts/train.sh"}
    return lambda command, **env: run(["bash", "-c", command], **settings, **env)


@pytest.mark.parametrize("log", [pytest.param("/dev/full", marks=needs_full_disk), "/proc/none/train.log"])
def test_a_log_file_that_cannot_be_written_does_not_change_the_status(script, log):
    result = script("exec $TRAIN", LOG_FILE=log)
    assert result.returncode == 7, result.stdout[-2000:]
    assert (
        result.stdout.count("can't be written (No s") == result.stdout.count(f"warning: {log} can't be written") == 1
    )
    assert result.stdout.splitlines()[-1] == "30000"


def test_nor_does_a_reader_that_has_had_enough(script, tmp_path):
    log = tmp_path / "train.log"
    result = script("$TRAIN | head -n 1; exit ${PIPESTATUS[0]}", LOG_FILE=log)
    assert result.returncode == 7, result.stdout[-2000:]
    assert log.read_text().splitlines()[-1] == "30000"


def test_a_device_of_minus_1_is_no_gpu(launched):
    assert "--num_gpus 1" in launched(CUDA_VISIBLE_DEVICES="-1")


def test_variables_and_flags_reach_the_program(launched):
    call = launched("--dft_alpha", "0.7", MODEL="m", DATA="a.jsonl b.jsonl", OUTPUT_DIR="o", CUDA_VISIBLE_DEVICES="")
    program = call.split("train_dft.py ")[1].split(" / ")[0]
    assert program == (
        "--model_name_or_path m --data_files a.jsonl b.jsonl --output_dir o --deepspeed ds_config/zero3.json "
        "--dft_alpha 0.7"
    )
    assert "--deepspeed" not in launched(DS_CONFIG="", CUDA_VISIBLE_DEVICES="").split("train_dft.py")[1]


# a shell could not listen to a signal that is ignored when it starts
RANK = f"""#!{sys.executable}
import os, pathlib, signal, time
directory = pathlib.Path(os.environ["DFT_RUN_DIR"])
def stop(number, frame):
    os.write(1, b"got USR1\\n")
    (directory / "status").write_text("143")
    os._exit(1)
signal.signal(signal.SIGUSR1, stop)
(directory / "rank-0").write_text(str(os.getpid()))
os.write(1, b"ready\\n")
while True:
    time.sleep(0.1)
"""


def test_a_signal_goes_to_the_ranks_and_their_status_comes_back(tmp_path):
    """A launcher would kill them after 30 s, and end with another status."""
    stub = tmp_path / "torchrun"
    stub.write_text(RANK)
    stub.chmod(0o755)
    env = environment_of(LAUNCHER="torchrun", DS_CONFIG="", LOG_DIR=tmp_path, VIRTUAL_ENV="none")
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    with subprocess.Popen(
        ["bash", "scripts/train.sh"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    ) as script:
        lines = iter(script.stdout)
        assert any(line == "ready\n" for line in lines)
        script.send_signal(signal.SIGUSR1)
        assert "got USR1\n" in list(lines)
    assert script.returncode == 143
