"""Two hosts on one machine: network namespaces with a cable between them, one process in each, over gloo."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dft.distributed import free_port
from examples.make_example_data import facts_en
from tests.helpers import ROOT, TIMEOUT, environment_of, read_log, tiny_run, write_jsonl

pytestmark = pytest.mark.launch

MASTER = "10.93.0.1"
ADDRESSES = (MASTER, "10.93.0.2")
SECONDS_UNTIL_REFUSED = 60
AFTER_CUT = (r"rank 1\b.* has not been heard of for", r"rank 0\b.* has not answered for")  # what each host says
FLAGS = ("--validation_split_percentage", 0, "--save_steps", 2, "--report_to", "none")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces, in which the host's name resolves to the loopback, as it often does."""
    if shutil.which("ip") is None:
        pytest.skip("there is no program ip (package iproute2)")
    names = [f"dft{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        devices = [f"v{name}" for name in names]
        ip("link", "add", devices[0], "netns", names[0], "type", "veth", "peer", "name", devices[1], "netns", names[1])
        for name, device, address in zip(names, devices, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", device, "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces can be made here: {error.stderr.strip()}")
    finally:
        for name in names:  # its devices go with it
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture(scope="module")
def trained(hosts, tiny_model, chat_file, tmp_path_factory) -> Path:
    """The directory of a run that scripts/train.sh has started on both hosts, with output0.txt, out0 and logs0."""
    directory = tmp_path_factory.mktemp("trained")
    scripts = []
    for rank, host in enumerate(hosts):
        words = ["bash", "scripts/train.sh", *tiny_run(tiny_model, chat_file, directory / f"out{rank}"), *FLAGS]
        env = {"LAUNCHER": "torchrun", "DS_CONFIG": "", "NNODES": 2, "NODE_RANK": rank, "NPROC": 1}
        env |= {"MASTER_ADDR": MASTER, "LOG_DIR": directory / f"logs{rank}"}
        with open(directory / f"output{rank}.txt", "w") as file:
            command = ["ip", "netns", "exec", host, *map(str, words)]
            scripts.append(
                subprocess.Popen(command, cwd=ROOT, env=environment_of(**env), stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        statuses = [script.wait(timeout=TIMEOUT) for script in scripts]
    finally:
        for script in scripts:
            script.terminate()  # which ends its ranks
    outputs = [(directory / f"output{rank}.txt").read_text()[-3000:] for rank in (0, 1)]
    assert statuses == [0, 0], "".join(outputs)
    return directory


def environments_of_ranks(*, has_one_host: bool) -> list[dict[str, str]]:
    """What a launcher would give two ranks, on one host or on one each."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2" if has_one_host else "1", "MASTER_PORT": free_port()}
    common["MASTER_ADDR"] = "127.0.0.1" if has_one_host else MASTER
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank if has_one_host else 0)} for rank in (0, 1)]


@pytest.fixture(scope="module")
def groups(hosts, trained, tiny_model, chat_file, tmp_path_factory) -> dict[str, list[SimpleNamespace]]:
    """How other runs of two ranks end, by name. Their outputs are in NAME/out0 and NAME/out1 of `trained`."""
    directory = tmp_path_factory.mktemp("groups")
    other = write_jsonl(directory / "other.jsonl", facts_en()[:40])
    shutil.copytree(trained / "out0", trained / "resumed" / "out0")
    resume = ("--resume_from_checkpoint", "last", "--max_steps", 4)
    shared = ("--output_dir", trained / "shared", "--max_steps", 24, "--save_steps", 4)
    endless = ("--max_steps", 100000, "--save_strategy", "no")
    commands = {  # the flags of each rank
        "one host": ((), ()),
        "data": ((), ("--data_files", other)),
        "resumed": (resume, resume),
        "configuration": ((), ("--config", "missing.yaml")),
        "killed": (shared, shared),
        "after it": ((*shared, "--resume_from_checkpoint", "last"),) * 2,
        "cable": (endless, endless),
    }
    unplug = ["ip", "-n", hosts[1], "link", "set", f"v{hosts[1]}", "down"]
    faults = {
        "killed": [{"when": f"{trained}/shared/checkpoint-4/manifest.json", "kill": [1]}],
        "cable": [
            {"when": f"{trained}/cable/out0/train_log.jsonl", "text": '"step": 20,', "run": unplug},
            *(
                {"when": f"{directory}/cable.{rank}", "text": text, "kill": [rank]}
                for rank, text in enumerate(AFTER_CUT)
            ),
        ],
    }
    runs = {}
    for name, flags in commands.items():
        environments = environments_of_ranks(has_one_host=name == "one host")
        programs = [
            ["train_dft.py", *tiny_run(tiny_model, chat_file, trained / name / f"out{rank}"), *FLAGS, *flags[rank]]
            for rank in (0, 1)
        ]
        namespaces = (None, None) if name == "one host" else hosts
        ranks = [
            {"namespace": namespace, "env": env, "command": [str(word) for word in program]}
            for namespace, env, program in zip(namespaces, environments, programs, strict=True)
        ]
        runs[name] = {"ranks": ranks, "faults": faults.get(name, [])}
    worker = [sys.executable, "-m", "tests.launch.hosts_worker", directory]
    subprocess.run(
        worker, cwd=ROOT, env=environment_of(), input=json.dumps(runs), text=True, timeout=TIMEOUT, check=True
    )
    return {
        name: [SimpleNamespace(**rank) for rank in json.loads((directory / f"{name}.json").read_text())]
        for name in commands
    }


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in read_log(directory) if "loss" in record]


def test_two_hosts_train_as_two_processes_of_one(trained, groups):
    assert [rank.status for rank in groups["one host"]] == [0, 0], groups["one host"][0].output
    ours, theirs = losses(trained / "out0"), losses(trained / "one host" / "out0")
    assert len(theirs) == 2
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_interface_is_that_of_the_way_to_the_master(trained, hosts):
    assert f"which agree; gloo's interface on this one: v{hosts[0]}" in (trained / "output0.txt").read_text()


def errors_of(ranks: list[SimpleNamespace]) -> list[str]:
    """The message of each host; both end in time with the status of a user's mistake, and without training."""
    found = []
    for rank in ranks:
        assert rank.status == 2, rank.output
        assert rank.seconds < SECONDS_UNTIL_REFUSED
        assert "Model: " not in rank.output
        assert "Traceback" not in rank.output
        found.append(rank.output[rank.output.index("error: ") + len("error: ") :])
    return found


def test_different_data_is_refused_on_both_hosts(groups):
    for message in errors_of(groups["data"]):
        assert message.startswith("the nodes don't agree")
        assert "\n  content_of_rows: " in message
        assert " on node 0 (" in message
        assert " on node 1 (" in message
        assert "\ndata: give every node the same data files" in message


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("resumed", "--resume_from_checkpoint: no checkpoint in"),
        ("configuration", "--config missing.yaml can't be read"),
    ],
)
def test_what_only_one_host_lacks_is_refused_on_both(groups, name, error):
    """Host 1 has no checkpoint; or no configuration file, which is found before it has joined host 0."""
    first, second = errors_of(groups[name])
    assert first.startswith("node 1 (")
    assert f"): {error}" in first.splitlines()[0]
    # a checkpoint is looked for by all ranks together, flags are read before they have met
    assert second.startswith("node 1 (" if name == "resumed" else error)
    for message in (first, second):
        assert "): no such error. Every node needs the same files" in message


# ---- faults of a node ---------------------------------------------------------------------------


def test_a_killed_node_is_named_and_the_run_goes_on_from_its_checkpoint(groups, trained):
    killed, after = groups["killed"], groups["after it"]
    assert [rank.status for rank in killed] == [1, -9], killed[0].output
    assert "error: rank 1 (" in killed[0].output
    assert "Traceback" not in killed[0].output
    assert "--resume_from_checkpoint last" in killed[0].output
    assert [rank.status for rank in after] == [0, 0], after[0].output
    steps = [record["step"] for record in read_log(trained / "shared") if "loss" in record]
    assert steps[-1] == 24
    assert steps == sorted(set(steps))
    assert (trained / "shared" / "model.safetensors").exists()


def test_a_pulled_cable_is_told_on_both_hosts(groups):
    """It breaks no connection, so nothing else would say so before the time-out."""
    for rank, text in zip(groups["cable"], AFTER_CUT, strict=True):
        assert re.search(text, rank.output), rank.output
