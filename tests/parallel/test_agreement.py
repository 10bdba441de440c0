"""What nodes are compared by before a training: every difference is found, named, and answered with a remedy."""

import copy
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dft import distributed
from dft.checkpoints.facts import run_facts
from dft.config.command_line import parse_args
from dft.config.loss import LossConfig
from dft.distributed import describe_failures, free_port, listed, node_names, stop_listening, tell_failure
from dft.errors import SharedUserError
from dft.parallel import agreement
from dft.parallel.agreement import digest_of_code, refuse_differences, start_facts, versions
from examples.make_tiny_model import make_model
from tests.helpers import ROOT, TIMEOUT, environment_of, rows

NODES = ["node 0 (alpha)", "node 1 (beta)"]


def facts_of(tmp_path, *flags) -> dict:
    """What a rank is compared by before the data is prepared, with two files of its own."""
    (tmp_path / "chats.jsonl").touch()
    command = ["--model_name_or_path", "m", "--data_files", tmp_path / "chats.jsonl", "--output_dir", tmp_path]
    settings = parse_args([str(word) for word in (*command, "--torch_dtype", "float32", *flags)])
    return start_facts(settings, settings.training)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--learning_rate", "1e-3"], "learning_rate"),
        (["--seed", "7"], "seed"),
        (["--max_steps", "9"], "max_steps"),
        (["--num_train_epochs", "2"], "num_train_epochs"),
        (["--gradient_accumulation_steps", "3"], "gradient_accumulation_steps"),
        (["--per_device_train_batch_size", "3"], "per_device_train_batch_size"),
        (["--batching", "packed"], "batching"),
        (["--max_length", "99"], "max_length"),
        (["--dft_alpha", "0.5"], "dft_alpha"),
        (["--objective", "eaft"], "objective"),
        (["--fused_loss", "off"], "fused_loss"),
        (["--logging_steps", "3"], "logging_steps"),
        (["--save_steps", "3"], "save_steps"),
        (["--lr_scheduler_kwargs", '{"num_cycles": 2}'], "lr_scheduler_kwargs"),
        (["--torch_dtype", "bfloat16"], "torch_dtype"),
    ],
)
def test_a_flag_that_shapes_the_training_is_compared(tmp_path, flags, name):
    with pytest.raises(SharedUserError, match=rf"(?m)^  {name}[.\w]*: .* on node 0 \(alpha\); .* on node 1 \(beta\)$"):
        refuse_differences([facts_of(tmp_path), facts_of(tmp_path, *flags)], NODES)


def test_paths_and_what_one_rank_uses_are_not_compared(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    flags = ["--logging_dir", str(other), "--data_cache_dir", str(other), "--run_name", "b", "--disable_tqdm", "True"]
    flags += ["--dataloader_num_workers", "3", "--preprocessing_num_workers", "2", "--report_to", "tensorboard"]
    refuse_differences([facts_of(tmp_path), facts_of(other, *flags)], NODES)


def test_the_names_that_are_left_out_are_flags(tmp_path):
    """A flag that was renamed would be compared again without anybody noticing."""
    command = ["--model_name_or_path", "m", "--data_files", "d", "--output_dir", str(tmp_path)]
    settings = parse_args(command)
    known = {name for group in settings for name in vars(group)}
    assert known >= agreement.OF_A_NODE


def with_change(facts: dict, kind: str, name: str) -> dict:
    changed = copy.deepcopy(facts)
    assert name in changed[kind]
    changed[kind][name] = "another"
    return changed


@pytest.mark.parametrize(
    ("kind", "name", "remedy"),
    [
        *(("versions", name, "install the same versions") for name in ("torch", "transformers", "deepspeed")),
        *(("versions", name, "install the same versions") for name in ("accelerate", "python")),
        ("code", "digest_of_code", "check out the same commit"),
        ("device", "device", "the same kind of GPU"),
    ],
)
def test_software_and_device_are_compared(tmp_path, kind, name, remedy):
    facts = facts_of(tmp_path)
    with pytest.raises(SharedUserError, match=rf"(?s)  {name}: .* on node 0 \(alpha\); another on node 1.*{remedy}"):
        refuse_differences([facts, with_change(facts, kind, name)], NODES)


def test_patch_versions_of_what_does_not_compute_are_not_compared(monkeypatch):
    found = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "deepspeed": "0.19.8", "accelerate": "1.15.0"}
    monkeypatch.setattr(agreement, "version", found.__getitem__)
    before = versions()
    found["accelerate"] = "1.15.1"
    assert versions() == before
    for name in ("torch", "transformers", "deepspeed"):
        found[name] += ".post1"
        assert versions() != before
        before = versions()


def test_the_digest_of_the_code_tells_a_changed_line(monkeypatch, tmp_path):
    package = tmp_path / "dft" / "parallel"
    package.mkdir(parents=True)
    monkeypatch.setattr(agreement, "__file__", str(package / "agreement.py"))
    digests = set()
    for name, text in (("dft/a.py", "x = 1\n"), ("dft/a.py", "x = 2\n"), ("train_dft.py", "y = 1\n")):
        (tmp_path / name).write_text(text)
        digests.add(digest_of_code())
    assert len(digests) == 3


# ---- data and checkpoint ------------------------------------------------------------------------


@pytest.fixture
def data_facts(tmp_path, monkeypatch):
    """What a rank is compared by after the data is prepared, of given rows and settings."""
    args = parse_args(["--model_name_or_path", "m", "--data_files", "d", "--output_dir", str(tmp_path)]).training
    config = make_model(600, hidden_size=32, num_layers=1).config
    gathered = []
    monkeypatch.setattr(agreement, "gather_from_all", lambda facts: ([gathered.append(facts)], NODES))
    monkeypatch.setattr(agreement, "refuse_differences", lambda gathered, nodes: None)
    monkeypatch.setattr(agreement, "stop_listening", lambda: None)

    def find(train=16, evaluation=8, step=0, attention="sdpa", channels=(), loss=None) -> dict:
        train, evaluation = (rows(data) if isinstance(data, int) else data for data in (train, evaluation))
        report = {"files": [{"kept": len(train)}]}
        prepared = SimpleNamespace(train=train, evaluation=evaluation, channels=list(channels), report=report)
        made_with = run_facts(args, loss or LossConfig(), config, train)
        agreement.agree_on_data(made_with, prepared, step, attention)
        return gathered.pop()

    return find


def test_contents_of_data_and_the_step_of_the_checkpoint_are_compared(data_facts):
    changed_token = rows(16).map(lambda row, i: {"input_ids": [*row["input_ids"][:-1], i]}, with_indices=True)
    reordered = rows(16).select([*range(1, 16), 0])
    first = data_facts()
    refuse_differences([first, data_facts()], NODES)
    for other, name in (
        (data_facts(train=changed_token), "content_of_rows"),
        (data_facts(train=reordered), "content_of_rows"),
        (data_facts(train=15), "training_rows"),
        (data_facts(train=15), "rows_of_files"),
        (data_facts(evaluation=rows(8, seed=3)), "content_of_evaluation"),
        (data_facts(evaluation=7), "evaluation_rows"),
        (data_facts(step=2), "step"),
        (data_facts(attention="eager"), "attention"),
        (data_facts(channels=["a"]), "channels"),
        (data_facts(loss=LossConfig(dft_alpha=0.5)), "dft_alpha"),
    ):
        with pytest.raises(SharedUserError, match=rf"(?m)^  {name}: .* on node 0 \(alpha\); .* on node 1 \(beta\)$"):
            refuse_differences([first, other], NODES)


# ---- messages -----------------------------------------------------------------------------------


def test_a_message_names_nodes_or_the_ranks_where_a_node_differs():
    facts = [{"device": {"device": value}} for value in ("H100", "H100", "H100", "H200")]
    nodes = node_names(["a", "a", "b", "b"], [0, 1, 0, 1])
    with pytest.raises(SharedUserError) as caught:
        refuse_differences(facts, nodes)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  device: H100 on node 0 (a), rank 2 of node 1 (b); H200 on rank 3 of node 1 (b)"
    assert lines[2] == "device: use the same kind of GPU on every node"


def test_nodes_of_the_same_host_name_are_told_apart():
    assert node_names(["x"] * 4, [0, 1, 0, 1]) == ["node 0 (x)"] * 2 + ["node 1 (x)"] * 2


def test_long_lists_of_nodes_are_cut():
    assert listed(["a", "a", "b", "c"]) == "a, b, c"
    assert listed([f"n{i}" for i in range(64)]) == "n0, n1, n2 and 61 more"


def test_an_error_says_which_nodes_have_it():
    nodes = ["node 0 (a)", "node 0 (a)", "node 1 (b)", "node 1 (b)"]
    assert describe_failures(nodes, ["wrong"] * 4) == "wrong"
    assert describe_failures(nodes, ["wrong", None, "wrong", None]) == "wrong"
    assert describe_failures(nodes[:2], [None, "wrong"]) == "wrong"  # a run on one node
    message = describe_failures(nodes, [None, None, "no data", None])
    assert message.startswith("node 1 (b): no data\nnode 0 (a): no such error.")
    both = describe_failures(nodes, ["no model", None, "no data", None])
    assert both == "node 0 (a): no model\nnode 1 (b): no data"


# ---- two processes ------------------------------------------------------------------------------

TWO_NODES = """
from datetime import timedelta
import torch
import torch.distributed as dist
from dft.config.training import DFTTrainingArguments
from dft.distributed import once_per_node
from dft.errors import UserError
from dft.program import program

with program():
    rank = DFTTrainingArguments(output_dir=".", ddp_timeout=99).process_index
    assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=99)
    assert once_per_node(lambda: rank) == rank
    if rank == 1:
        raise {}("no data here")
    once_per_node(lambda: print("WORK"))
"""


def run_two_nodes(exception: str) -> tuple[list[int], list[str], list[str]]:
    """Exit statuses, stdout and stderr of two processes, each of which takes itself for a node."""
    port = free_port()
    places = [
        {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port} for rank in (0, 1)
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_NODES.format(exception)],
            cwd=ROOT,
            env=environment_of(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo", **place),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in places
    ]
    outputs = [process.communicate(timeout=TIMEOUT) for process in started]
    return [process.returncode for process in started], *map(list, zip(*outputs, strict=True))


def test_a_rank_that_fails_is_heard_of_before_work_begins_elsewhere():
    """Without being told, the other would wait for the one that has ended."""
    statuses, (work, _), (first, second) = run_two_nodes("UserError")
    assert statuses == [2, 2], first + second
    assert "WORK" not in work
    assert re.search(r"(?m)^error: node 1 \(.*\): no data here\nnode 0 \(.*\): no such error\.", first)
    assert re.search(r"(?m)^error: no data here\nnode 1 \(.*\): the error above\nnode 0 \(.*\): no such", second)


def test_an_unexpected_exception_is_heard_of_too():
    statuses, (work, _), (first, second) = run_two_nodes("ImportError")
    assert statuses == [2, 1], first + second
    assert "WORK" not in work
    assert re.search(r"(?m)^error: node 1 \(.*\): ImportError: no data here\nThe traceback is in", first)
    assert second.count("ImportError: no data here") == 1
    assert "Traceback" in second


def test_a_rank_that_fails_in_training_does_not_wait_for_the_others(monkeypatch):
    monkeypatch.setattr(distributed, "_others_listen", True)
    stop_listening()
    assert tell_failure("wrong") == ""
