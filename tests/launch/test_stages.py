"""Trainings in stages by their command lines: a dry run of an example, a run, and runs that go on from it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import ROOT, Outcome, read_log, run_programs, tiny_run

pytestmark = pytest.mark.launch

TWO = """
- {name: facts, sources: {facts_en: 1}, steps: 50%}
- {name: tools, sources: {tools_en: 70%, dialogues_zh: 30%}, steps: 50%, learning_rate_factor: 0.5}
"""
SETTINGS = ("--save_steps", 3, "--max_steps", 4, "--batching", "packed", "--max_length", 512)
SETTINGS += ("--preprocessing_num_workers", 1, "--validation_split_percentage", 0)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("stages")
    (directory / "two.yaml").write_text(TWO, encoding="utf-8")
    (directory / "other.yaml").write_text(TWO.replace("70%", "80%").replace("30%", "20%"), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def outcomes(places, tiny_model) -> dict[str, Outcome]:
    def command(name: str, stages: Path, *flags) -> list:
        base = tiny_run(tiny_model, ROOT / "examples" / "data", places / name)
        return ["train_dft.py", *base, *SETTINGS, "--stages", stages, "--data_cache_dir", places / "cache", *flags]

    dry = ("--dry_run", "True", "--max_steps", -1, "--num_train_epochs", 1)
    on = ("--resume_from_checkpoint", places / "whole" / "checkpoint-3")
    commands = {
        "example": command("example", ROOT / "examples" / "stages" / "dmt.yaml", *dry),
        "whole": command("whole", places / "two.yaml"),
        "resumed": command("resumed", places / "two.yaml", *on),
        "refused": command("refused", places / "other.yaml", *on),
    }
    return run_programs(commands, places / "outcomes")


def test_a_dry_run_shows_the_stages(outcomes, places):
    assert outcomes["example"].status == 0, outcomes["example"].output
    stages = json.loads((places / "example" / "data_report.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["special", "general"]
    assert stages[1]["sources"]["tools_en"]["times_seen"] == pytest.approx(1 / 8, abs=0.05)
    for number, stage in enumerate(stages, start=1):
        assert f"stage {number}, {stage['name']}: steps " in outcomes["example"].output
    page = (places / "example" / "data_report.html").read_text()
    assert "<li>stage 2, general: steps " in page


def test_a_run_says_its_stages_and_goes_on_as_if_it_had_not_stopped(outcomes, places):
    for name in ("whole", "resumed"):
        assert outcomes[name].status == 0, outcomes[name].output
    records = [record for record in read_log(places / "whole") if "train/stage" in record]
    assert [record["train/stage"] for record in records] == [1, 1, 2, 2]
    assert "Stage 2 of 2, tools: steps 3 to 4" in outcomes["whole"].output
    assert "Stage 2 of 2, tools: steps 3 to 4" in outcomes["resumed"].output
    whole, resumed = (load_file(places / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_plan_is_refused(outcomes):
    assert outcomes["refused"].status == 2, outcomes["refused"].output
    assert "stages: checkpoint [{'name': 'facts'" in outcomes["refused"].output
