"""What the documents name exists: files, flags, commands, metrics; and the code is formatted."""

import importlib
import json
import re
import subprocess
import sys

import pytest

from dft.config.command_line import known_options
from tests.helpers import ROOT, read_log, run

READMES = ["README.md", "README.zh.md"]
OTHERS = [
    "CONTRIBUTING.md",
    "docs/batches.md",
    "docs/dashboards.md",
    "docs/data.md",
    "docs/loss.md",
    "ds_config/README.md",
    "examples/eval/README.md",
]
MADE_BY_A_RUN = {  # named in the documents, made when the program runs
    "data_report.json", "rejected.jsonl", "training_curves.png", "train_log.jsonl", "all_results.json",
    "trainer_state.json", "training_args.json", "train_distributed.log", "my_run.yaml", "more.json", "train.jsonl",
    "eval.jsonl", "chats.jsonl", "tracker_ids.json", "my_rows.jsonl",
    "run.json", "test.jsonl",
}  # fmt: skip
FLAGS_OF_OTHERS = {
    *("--no-build-isolation", "--help", "--size"),  # of pip, of all, of a benchmark
    *("--logdir", "--port"),  # of TensorBoard
    *("--names", "--output"),  # of plot_runs.py and export.py, evaluate.py
    *("--model", "--model_args", "--tasks", "--include_path", "--apply_chat_template"),  # of lm-evaluation-harness
    *("--batch_size", "--output_path", "--log_samples", "--metadata"),
}


@pytest.mark.parametrize("name", READMES + OTHERS)
def test_files_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w/*.-])[\w.-]+(?:/[\w.-]+)*\.(?:py|sh|json|jsonl|yaml|md|txt|png|log)\b", text)
    missing = {p for p in paths if not (ROOT / p).exists() and not (ROOT / name).parent.joinpath(p).exists()}
    missing -= {
        p for p in missing for d in ("scripts", "ds_config", "examples/data") if (ROOT / d / p).exists()
    }  # as in the file tree
    assert missing <= MADE_BY_A_RUN, missing
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / name).parent / link).exists(), link


@pytest.mark.parametrize("name", READMES + OTHERS + ["scripts/finetune.sh", "scripts/quickstart.sh"])
def test_flags_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - FLAGS_OF_OTHERS
    launcher = {"--config_file", "--num_processes"} if name == "scripts/finetune.sh" else set()
    script = {"--data", "--system"} if name == "scripts/quickstart.sh" else set()
    assert flags <= set(known_options()) | launcher | script


@pytest.mark.parametrize("name", READMES)
def test_variables_of_the_launch_script_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    scripts = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.sh"))
    for variable in re.findall(r"\b([A-Z][A-Z_]{3,})=", text):
        assert variable in scripts, variable


def test_both_readmes_say_the_same():
    """The same flags, files, metrics, headings and code."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    for pattern in (r"`[^`\n]*`", r"(?m)^#+ ", r"https?://[^)\s]+"):
        ours, theirs = (sorted(re.findall(pattern, text)) for text in (english, chinese))
        assert ours == theirs


def test_commands_of_the_continuous_integration_are_the_readmes():
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
    assert "bash scripts/test.sh" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_constraints_cover_the_requirements():
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in constraints if "==" in line}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        package = re.split(r"[<>=#\[ ]", line)[0].lower()
        assert not package or package in pinned, package


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_benchmarks_can_be_loaded(name):
    """They import the project's parts, which move."""
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_style(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.launch
def test_quickstart_learns(tmp_path):
    """The first command of the README, as it stands, in the environment of the tests."""
    out = tmp_path / "quickstart"
    result = run(["bash", "scripts/quickstart.sh"], timeout=900, OUT=str(out), OMP_NUM_THREADS="")
    assert result.returncode == 0, result.stdout[-5000:]
    assert "The capital of France is Paris." in result.stdout
    records = [r for r in read_log(out / "model") if "ce_loss" in r]
    assert records[-1]["ce_loss"] < 0.7 * records[0]["ce_loss"]
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert records[-1]["train/avg_p_correct"] > records[0]["train/avg_p_correct"] + 0.05
    assert records[-1]["train/dft_alpha"] == 0.7
    sources = {path.stem for path in (ROOT / "examples" / "data").iterdir()}
    assert {key.split("/")[1] for record in records for key in record if key.startswith("channel/")} == sources
    assert "here α = 0.7" in (out / "model" / "README.md").read_text()
    base = json.loads((out / "base" / "all_results.json").read_text())
    model = json.loads((out / "model" / "all_results.json").read_text())
    assert model["eval_acc"] > base["eval_acc"]
