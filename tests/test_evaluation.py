"""The tasks of examples/eval: what they name exists, answers were taught, and lm-evaluation-harness runs them."""

import importlib.util
import json
import re
import sys

import pytest
import yaml

from scripts import export
from tests.helpers import ROOT, run

EVAL = ROOT / "examples" / "eval"
TASKS = sorted(path.stem for path in EVAL.glob("*.yaml"))
METRICS = {
    "facts_choice": "acc,none",
    "facts_qa": "exact_match,none",
    "facts_qa_paraphrased": "exact_match,none",
}


class Loader(yaml.SafeLoader):
    """Reads the harness's tag for a function as its name."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read_task(name: str) -> dict:
    task = yaml.load((EVAL / f"{name}.yaml").read_text(), Loader)
    return {**read_task(task.pop("include").removesuffix(".yaml")), **task} if "include" in task else task


def read_rows(task: dict) -> list[dict]:
    return [json.loads(line) for line in (EVAL / task["dataset_kwargs"]["file"]).read_text().splitlines()]


def taught() -> dict[str, str]:
    """Questions and answers of the training, with the system prompt that all of them have."""
    rows = [json.loads(line) for line in (ROOT / "examples" / "data" / "facts_en.jsonl").read_text().splitlines()]
    assert len({row["messages"][0]["content"] for row in rows}) == 1
    return {row["messages"][1]["content"]: row["messages"][2]["content"] for row in rows}


def test_there_are_tasks():
    assert list(METRICS) == TASKS


@pytest.mark.parametrize("name", TASKS)
def test_a_task_names_what_exists(name):
    task = read_task(name)
    assert task["task"] == name
    module, function = task["custom_dataset"].split(".")
    assert f"def {function}(" in (EVAL / f"{module}.py").read_text()
    rows = read_rows(task)
    assert len({row["question"] for row in rows}) == len(rows) > 50
    templates = "".join(value for key, value in task.items() if key.startswith("doc_to"))
    keys = set(re.findall(r"{{(\w+)}}", templates))
    assert all(row.keys() == keys for row in rows)
    first = json.loads((ROOT / "examples" / "data" / "facts_en.jsonl").read_text().splitlines()[0])
    assert task["description"] == first["messages"][0]["content"]


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_was_taught_and_wordings_are_what_they_are_said_to_be(name):
    lessons = taught()
    for row in read_rows(read_task(name)):
        right = row["choices"][row["answer"]] if "choices" in row else row["answer"]
        assert right in lessons.values()
        assert lessons.get(row["question"]) == (right if name == "facts_qa" else None)
        if "choices" in row:
            assert len(set(row["choices"])) == 4
            assert sum(choice in lessons.values() for choice in row["choices"]) == 1


def test_right_choices_are_spread_evenly():
    """A model that finds all choices alike, and takes the first, must score by chance."""
    places = [row["answer"] for row in read_rows(read_task("facts_choice"))]
    assert [places.count(place) for place in range(4)] == [len(places) // 4] * 4


def test_requirements_agree_with_the_constraints():
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in (EVAL / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert [line for line in lines if line.split("==")[0] in ("torch", "transformers")] == [
        line for line in constraints if line.split("==")[0] in ("torch", "transformers")
    ]


def harness() -> list[str]:
    """The command of lm-evaluation-harness: of this environment, or of the one that examples/eval/README.md makes."""
    own = ROOT / ".venv-eval" / "bin" / "lm_eval"
    if importlib.util.find_spec("lm_eval") is not None:
        return [sys.executable, "-m", "lm_eval"]
    if not own.exists():
        pytest.skip("lm-eval is not installed, see examples/eval/README.md")
    return [str(own)]


@pytest.mark.launch
def test_the_harness_runs_the_tasks_offline(tiny_model, tmp_path):
    command = harness()
    export.main([str(tiny_model), "--output", str(tmp_path / "model")])  # which gives it a chat template
    flags = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", ",".join(TASKS)]
    flags += ["--include_path", "examples/eval", "--apply_chat_template", "--batch_size", "4", "--limit", "8"]
    result = run([*command, *flags, "--output_path", tmp_path / "out", "--log_samples"])
    assert result.returncode == 0, result.stdout[-5000:]
    scores = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    assert {name: 0 <= scores[name][metric] <= 1 for name, metric in METRICS.items()} == dict.fromkeys(TASKS, True)
    sample = json.loads(next((tmp_path / "out").rglob("samples_facts_choice_*.jsonl")).read_text().splitlines()[0])
    prompts = {arguments["arg_0"] for arguments in sample["arguments"].values()}
    system, question = read_task("facts_choice")["description"], sample["doc"]["question"]
    assert prompts == {
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    }
    assert [arguments["arg_1"] for arguments in sample["arguments"].values()] == sample["doc"]["choices"]
