"""What the documents name exists: files, flags, defaults, commands, functions; and the code is formatted."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib

import pytest

from dft.config.listing import load_listing
from dft.config.parser import known_options
from dft.distributed import has_accelerator
from tests.helpers import ROOT, read_log, run

READMES = ["README.md", "README.zh.md"]
OTHERS = [
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/gpu/README.md",
    "docs/README.md",
    "docs/batches.md",
    "docs/checkpoints.md",
    "docs/dashboards.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/evidence.md",
    "docs/faq.md",
    "docs/flags.md",
    "docs/glossary.md",
    "docs/judging.md",
    "docs/loss.md",
    "docs/memory.md",
    "docs/metrics.md",
    "docs/migration.md",
    "docs/multi_node.md",
    "docs/objectives.md",
    "docs/adapters.md",
    "docs/papers.md",
    "docs/scaling.md",
    "docs/selection.md",
    "docs/serving.md",
    "docs/stages.md",
    "docs/zh/data.md",
    "docs/zh/faq.md",
    "docs/zh/loss.md",
    "ds_config/README.md",
    "examples/eval/README.md",
    "recipes/README.md",
]
DOCUMENTS = READMES + OTHERS
MADE_BY_A_RUN = {  # named in the documents, made when the program runs
    "data_report.json", "rejected.jsonl", "training_curves.png", "train_log.jsonl", "all_results.json",
    "trainer_state.json", "training_args.json", "train_distributed.log", "my_run.yaml", "more.json", "train.jsonl",
    "eval.jsonl", "chats.jsonl", "tracker_ids.json", "my_rows.jsonl",
    "run.json", "test.jsonl", "manifest.json", "manifest-8.json", "eval_results.json", "generation_config.json",
    "adapter_config.json", "adapter_model.safetensors", "dropped.jsonl", "selection_report.json", "clusters.jsonl",
    "pii.jsonl", "evaluation_rows_found.jsonl", "scores.jsonl", "picks.jsonl", "answers.jsonl",
    "seed.jsonl", "train.log", "initial.json", "gsm8k.jsonl", "tools.jsonl", "mmlu.jsonl",
    "judged.jsonl", "other_answers.jsonl",
    "data/numinamath.jsonl", "data/numinamath-boxed.jsonl", "data/gsm8k.jsonl", "data.jsonl",
    "convert_hf_to_gguf.py",  # of llama.cpp
}  # fmt: skip
FLAGS_OF_OTHERS = {
    *("--help", "--size"),  # of all programs, of a benchmark
    *("--minutes", "--parts", "--tiny", "--limit"),  # of benchmarks/gpu
    *("--logdir", "--port"),  # of TensorBoard
    *("--no-deps", "--disable-pip", "--target"),  # of pip-audit, of docker
    *("--nodes", "--gpus-per-node"),  # of SLURM
    *("--names", "--output"),  # of plot_runs.py and export.py, evaluate.py
    *("--model", "--model_args", "--tasks", "--include_path", "--apply_chat_template"),  # of lm-evaluation-harness
    *("--batch_size", "--output_path", "--log_samples", "--metadata"),
    *("--gpus", "--gpu_memory", "--method", "--zero_stage", "--offload"),  # of estimate_memory.py
    *("--supervised", "--lora_r", "--quick"),
    "--tries",  # of benchmarks/faults.py
    *("--overwrite", "--min_characters", "--max_characters", "--min_turns", "--max_turns"),  # of select_data.py
    *("--max_repeated_lines", "--max_repeated_ngrams", "--max_top_ngram", "--ngram", "--min_entropy"),
    *("--max_entropy", "--languages", "--refusals", "--pii", "--threshold", "--shingle", "--num_perm", "--part"),
    *("--keep_share", "--min_ratio", "--max_ratio", "--tokens_at_once", "--cache_dir", "--warmup_clusters"),
    *("--warmup_rows", "--reward_model", "--label", "--alpha", "--num_rows", "--radius", "--embeddings"),
    *("--seed_files", "--seed_embeddings", "--nproc-per-node", "--beta", "--seed_rows", "--augmented_rows"),
    *("--train_flags", "--initial_model", "--work_dir", "--embedding_model", "--max_new_tokens"),
    *("--generated_at_once", "--generate", "--generations", "--answers"),  # of evaluate.py
    *("--repo-type", "--local-dir"),  # of hf
    *("--host", "--chat-template-kwargs"),  # of transformers serve
    *("--served-model-name", "--enable-lora", "--max-lora-rank", "--lora-modules"),  # of vLLM
    *("--outfile", "--outtype"),  # of llama.cpp
    *("--question", "--answer", "--skip_empty", "--system", "--prompt_suffix", "--channel"),  # of prepare_pairs.py
    *("--short_ngram", "--min_overlap", "--max_rows_per_ngram", "--copied_share"),
    *("--endpoint", "--rubric", "--votes", "--max_failed", "--report", "--price_in", "--price_out"),  # of judge.py
    *("--workers", "--timeout", "--max_retries", "--max_tokens", "--request"),
}
OPTIONS = set(known_options(load_listing()))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def slugs_of(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_document_is_tested():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name for name in listed if not name.startswith("benchmarks/results/")} <= set(DOCUMENTS)
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= set(DOCUMENTS)


def test_the_index_names_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([\w.]+\.md)", text_of("docs/README.md")))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_exist(name):
    text = text_of(name)
    paths = re.findall(r"(?<![\w/*.-])[\w.-]+(?:/[\w.-]+)*\.(?:py|sh|json|jsonl|yaml|md|txt|png|log)\b", text)
    beside = [(ROOT / name).parent, *([ROOT / "docs"] if name.startswith("docs/zh/") else [])]
    missing = {p for p in paths if not any((directory / p).exists() for directory in (ROOT, *beside))}
    missing -= {
        p for p in missing for d in ("scripts", "ds_config", "examples/data") if (ROOT / d / p).exists()
    }  # as in the file tree
    assert missing <= MADE_BY_A_RUN, missing
    for directory in re.findall(
        r"(?<![\w/.-])(?:dft|tests|benchmarks|examples|scripts|docs)(?:/[\w-]+)+(?![\w./-])", text
    ):
        assert (ROOT / directory).is_dir(), directory


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    text = text_of(name)
    for link in re.findall(r"\]\((?!http)([^)]+)", text):
        path, _, anchor = link.partition("#")
        assert (ROOT / name).parent.joinpath(path).exists(), link
        if anchor:
            assert anchor in slugs_of((ROOT / name).parent.joinpath(path).read_text() if path else text), link


@pytest.mark.parametrize("name", [*DOCUMENTS, "scripts/finetune.sh", "scripts/quickstart.sh"])
def test_flags_exist(name):
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text_of(name))) - FLAGS_OF_OTHERS
    launcher = {"--config_file", "--num_processes"} if name == "scripts/finetune.sh" else set()
    script = {"--data", "--system"} if name == "scripts/quickstart.sh" else set()
    assert flags <= OPTIONS | launcher | script


def test_defaults_are_the_programs():
    """In every table of flags: `| flags | defaults | …`, where the program has a default of its own."""
    entries = [entry for group in load_listing()["groups"].values() for entry in group if entry.get("action") is None]
    default_of = {flag: entry["default"] for entry in entries for flag in entry["flags"]}
    tested = set()
    for name in ("docs/flags.md", "docs/loss.md"):
        for flags, defaults in re.findall(r"(?m)^\| (`--[^|]*) \| ([^|]*) \|", text_of(name)):
            names = re.findall(r"`(--\w+)`", re.sub(r"\(.*?\)", "", flags))
            written = [word.strip() for word in defaults.split(",")]
            if len(written) == 1:
                written *= len(names)
            for flag, value in zip(names, written, strict=True):
                tested.add(flag)
                if default_of[flag] is not None and value != "required":
                    assert str(default_of[flag]) == value, flag
    assert len(tested) > 30


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_examples_use_what_exists(name):
    """The names that they import, and the keywords that they call them with."""
    for example in re.findall(r"(?ms)^```python\n(.*?)^```", text_of(name)):
        tree = ast.parse(example)
        imported = {
            alias.name: getattr(importlib.import_module(node.module), alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in imported:
                inspect.signature(imported[call.func.id]).bind(
                    *call.args, **{keyword.arg: None for keyword in call.keywords}
                )


@pytest.mark.parametrize("name", READMES)
def test_tree_of_files_shows_every_room(name):
    rooms = {path.parent.name for path in (ROOT / "dft").glob("*/__init__.py")}
    assert set(re.findall(r"(?m)^dft/(\w+)/ ", text_of(name))) == rooms
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"(?m)^\w+\.py\b", text_of(name)))


def test_readme_is_read_in_five_minutes():
    assert len(text_of("README.md").splitlines()) <= 185


@pytest.mark.parametrize("name", [*READMES, "docs/flags.md", "docs/dashboards.md"])
def test_variables_of_the_launch_script_exist(name):
    of_trackers = {"SWANLAB_MODE", "SWANLAB_LOG_DIR", "WANDB_MODE", "TENSORBOARD_LOGGING_DIR"}
    of_tests = {"DASHBOARD_STEPS", "SCREENSHOTS"}
    scripts = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.sh"))
    for variable in re.findall(r"\b([A-Z][A-Z_]{3,})=", text_of(name)):
        assert variable in scripts or variable in of_trackers | of_tests, variable


TRANSLATED = {"README.md": "README.zh.md"} | {
    f"docs/{path.name}": f"docs/zh/{path.name}" for path in (ROOT / "docs" / "zh").glob("*.md")
}


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_say_the_same(name):
    """The same flags, files, metrics, headings, numbers of a table's lines, links and code."""
    english, chinese = text_of(name), text_of(TRANSLATED[name])
    for pattern in (r"`[^`\n]*`", r"(?m)^#+ ", r"https?://[^)\s]+", r"(?m)^\|"):
        ours, theirs = (sorted(re.findall(pattern, text)) for text in (english, chinese))
        assert ours == theirs
    assert code_of(english) == code_of(chinese)
    assert targets_of(name) == targets_of(TRANSLATED[name])


def code_of(text: str) -> list[str]:
    """The lines of a document's code in some language, without comments."""
    blocks = re.findall(r"(?ms)^```\w+\n(.*?)^```", text)
    return [re.sub(r" *#.*", "", line) for block in blocks for line in block.splitlines()]


def targets_of(name: str) -> list[str]:
    """The files that a document links to, from the root, but for itself in the other language."""
    links = re.findall(r"\]\((?!http)([^#)\s]+)", text_of(name))
    paths = [(ROOT / name).parent.joinpath(link).resolve().relative_to(ROOT).as_posix() for link in links]
    return sorted(path for path in paths if path not in {*TRANSLATED, *TRANSLATED.values()})


def test_numbers_of_the_comparison_are_the_results():
    """Those that the READMEs compare with other projects stand in benchmarks/results."""
    sources = {  # the file: what it says, and how the READMEs say it
        "metrics_cost_cpu.md": {"0.290%": "0.29%", "0.015%": "0.015%"},
        "data_prep.md": {"5.26": "5.3", "15.76": "15.8"},
        "train_step_cpu.md": {"1,129": "1,129", "403": "403"},
    }
    for source, numbers in sources.items():
        for measured, written in numbers.items():
            assert re.search(rf"\| +{re.escape(measured)} ", text_of(f"benchmarks/results/{source}")), measured
            for name in READMES:
                assert written in text_of(name), written
                assert f"benchmarks/results/{source}" in text_of(name)


def test_commands_of_the_continuous_integration_are_the_readmes():
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
    assert "bash scripts/test.sh" in text_of("README.md")


def test_constraints_cover_the_requirements():
    """Of the project and of its extras; an extra may pin a version itself, but no other than the constraints do."""
    pinned = dict(line.lower().split("==") for line in text_of("constraints.txt").splitlines() if "==" in line)
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"adapters", "dev", "bench", "judge", "selection"}
    requirements = [line.split("#")[0].strip() for line in text_of("requirements.txt").splitlines()]
    for requirement in [*filter(None, requirements), *sum(extras.values(), [])]:
        package = re.split(r"[<>=\[; ]", requirement)[0].lower()
        _, is_pinned, version = requirement.partition(";")[0].partition("==")
        assert package in pinned or is_pinned, package
        if is_pinned:
            assert pinned.get(package, version) == version, package


@pytest.mark.parametrize("name", DOCUMENTS)
def test_extras_exist(name):
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for names in re.findall(r"pip install (?:-e )?\.\[([\w,]+)\]", text_of(name)):
        assert set(names.split(",")) <= set(extras)


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
    log = read_log(out / "model")
    records = [r for r in log if "ce_loss" in r]
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
    if not has_accelerator():  # with GPUs, their number decides how many steps there are
        evaluations = [r for r in log if "eval_ce_loss" in r]
        assert_near_the_readme("training cross-entropy", [r["ce_loss"] for r in records], relative=0.25)
        assert_near_the_readme("training p_correct", [r["train/avg_p_correct"] for r in records], relative=0.05)
        assert_near_the_readme("evaluation cross-entropy", [r["eval_ce_loss"] for r in evaluations], relative=0.25)
        assert_near_the_readme("evaluation accuracy", [r["eval_acc"] for r in evaluations], relative=0.05)


def assert_near_the_readme(what: str, values: list[float], relative: float) -> None:
    """The first and the last value are about what the README says; the digits vary by machine."""
    written = re.search(rf"(?m)^ *{what} +about ([\d.]+) at step \d+ -> ([\d.]+) at step", text_of("README.md"))
    assert [values[0], values[-1]] == pytest.approx([float(number) for number in written.groups()], rel=relative)
