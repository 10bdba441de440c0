"""scripts/slurm.sbatch gives every node its number and one leader; stand-ins play the commands of SLURM."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT

SCONTROL = '#!/bin/bash\n[[ "$*" == "show hostnames n[7-8]" ]] && printf "n7\\nn8\\n"\n'
# as with --kill-on-bad-exit, the status is that of a task that fails
SRUN = """#!/bin/bash
[[ "$1" == --kill-on-bad-exit=1 ]] && shift
for i in 0 1; do SLURM_NODEID=$i "$@" || exit; done
"""
TRAIN = """#!/bin/bash
for name in LAUNCHER NNODES NODE_RANK MASTER_ADDR MASTER_PORT LOG_FILE; do echo "$name=${!name}"; done
printf '<%s>' "$@"
echo
exit "${STATUS:-0}"
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A directory with a stand-in for scripts/train.sh, and the commands of SLURM."""
    for name, text in (("bin/scontrol", SCONTROL), ("bin/srun", SRUN), ("scripts/train.sh", TRAIN)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def submitted(project: Path, *flags: str, **env: str) -> subprocess.CompletedProcess:
    own = {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "n[7-8]"}
    own |= {"SLURM_NNODES": "2", "PATH": f"{project / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "scripts" / "slurm.sbatch", *flags]
    return subprocess.run(command, env={**os.environ, **own, **env}, capture_output=True, text=True)


def test_every_node_has_its_number_and_the_same_leader(project):
    done = submitted(project, "--config", "my run.yaml")
    assert done.returncode == 0, done.stderr
    nodes = done.stdout.split("LAUNCHER=torchrun\n")[1:]
    for i, text in enumerate(nodes):
        assert f"NNODES=2\nNODE_RANK={i}\nMASTER_ADDR=n7\nMASTER_PORT=20123\n" in text
        assert f"LOG_FILE=logs/slurm_40123_node{i}.log\n<--config><my run.yaml>" in text
    assert len(nodes) == 2


def test_what_is_set_stays_and_failures_are_told(project):
    done = submitted(project, MASTER_ADDR="10.0.0.1", MASTER_PORT="5", LOG_DIR="here", STATUS="3")
    assert "MASTER_ADDR=10.0.0.1\nMASTER_PORT=5\nLOG_FILE=here/slurm_40123_node0.log" in done.stdout
    assert done.returncode == 3


def test_a_job_that_starts_again_goes_on_and_keeps_its_earlier_log(project):
    (project / "out" / "checkpoint-4").mkdir(parents=True)
    done = submitted(project, "--dft_alpha", "1", OUTPUT_DIR="out", SLURM_RESTART_COUNT="2")
    words = "<--dft_alpha><1><--resume_from_checkpoint><last>"
    assert f"LOG_FILE=logs/slurm_40123_2_node0.log\n{words}" in done.stdout


def test_it_has_to_be_submitted_in_the_project(tmp_path):
    done = submitted(tmp_path)
    assert done.returncode == 2
    assert "start sbatch in the project's directory" in done.stderr
