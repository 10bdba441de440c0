"""Names with control characters, Markdown and HTML in them can't forge what is printed, logged or written."""

import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from dft.config.data import DataConfig
from dft.config.training import DFTTrainingArguments
from dft.errors import UserError
from dft.pickles import check_checkpoint
from dft.printable import printable
from dft.program import program
from dft.reading.discovery import find_data_files
from dft.reading.raw_rows import read_rows
from dft.reading.rows import RejectedRow
from dft.tracking.console import summary
from dft.tracking.model_card import model_card
from dft.tracking.run_info import about_run
from dft.tracking.tracker_start import name_of
from dist_logger import get_logger, setup_logging
from tests.helpers import write_jsonl

ESCAPE, LINE, C1, OVERRIDE = "\x1b[2J", "\n", "\x9b31m", "\u202e"
NAME = f"a{ESCAPE}{LINE}b{C1}{OVERRIDE}c"
SHOWN = r"a\x1b[2J\nb\x9b31m\u202ec"
MARKDOWN = "[x](http:&<b>`**h1"
FORBIDDEN = (ESCAPE, C1, OVERRIDE, NAME)


def check(text: str) -> str:
    """The text, in which the name stands, if at all, only in its escaped form."""
    for forbidden in FORBIDDEN:
        assert forbidden not in text
    return text


def test_only_what_could_forge_is_escaped():
    harmless = "naïve 中文 \u00a0 👩\u200d💻 'quoted' \\n"
    assert printable(harmless) == harmless
    assert printable(NAME) == SHOWN
    assert printable("a\tb\nc\r\x1b", lines=True) == "a\tb\nc\\r\\x1b"
    assert printable("\u2028\ud800") == r"\u2028\ud800"


def test_a_log_record_is_one_record(tmp_path, capsys):
    setup_logging(tmp_path / "log")
    get_logger("here").warning("%s is odd", f"{NAME}\n2026-01-01 - [RANK 0/1] - INFO - forged")
    for text in (capsys.readouterr().err, (tmp_path / "log").read_text()):
        check(text)
        assert [line for line in text.splitlines() if not line.startswith("    ")] == text.splitlines()[:1]


def test_errors(monkeypatch, capsys):
    monkeypatch.setattr("dft.program.end_process", lambda status: None)
    with program():
        raise UserError(f"{ESCAPE}{C1}{OVERRIDE}\nsecond line")
    assert check(capsys.readouterr().err) == "error: \\x1b[2J\\x9b31m\\u202e\nsecond line\n"


def test_names_of_data_files(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    directory = tmp_path / NAME
    directory.mkdir()
    for name in (f"{NAME}.txt", f".{NAME}", f"{NAME}.jsonl"):
        (directory / name).write_text("{}")
    (directory / f"{NAME}.json").symlink_to(f"{NAME}-nowhere")
    find_data_files([str(directory)], "data_files")
    assert caplog.text.count(SHOWN) == 3 * 2 + 1  # each with its directory's name; the target of the link
    check(caplog.text)
    for missing in (f"{directory}/nothing.jsonl", str(directory / f"{NAME}.txt"), str(directory / f"{NAME}.json")):
        with pytest.raises(UserError) as caught:
            find_data_files([missing], "data_files")
        assert SHOWN in check(str(caught.value))
    with pytest.raises(UserError) as caught:
        list(read_rows(str(directory / NAME)))
    assert SHOWN in check(str(caught.value))
    assert str(RejectedRow(NAME, 1, "reason", "detail", "", True)) == f"{SHOWN}:1: detail"


def test_what_pickles_name(tmp_path):
    torch.save(torch.zeros(2), tmp_path / f"{NAME}.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError) as caught:
        check_checkpoint(tmp_path)
    assert SHOWN in check(str(caught.value))


def test_the_summary_and_the_name_for_trackers(tmp_path):
    history = [dict.fromkeys(("train_runtime", "train_tokens", "train_tokens_per_second", "train_steps"), 1)]
    args = DFTTrainingArguments(f"{tmp_path}/{NAME}", run_name=NAME, use_cpu=True)
    state = TrainerState(log_history=history, best_model_checkpoint=NAME, best_metric=1.0)
    assert SHOWN in check(summary(SimpleNamespace(state=state, args=args)))
    assert name_of(args) == SHOWN


@pytest.mark.parametrize(
    ("name", "escaped", "in_code"),
    [
        (NAME, SHOWN.replace("\\", r"\\").replace("[", r"\["), SHOWN),
        (MARKDOWN, r"\[x\](http:&amp;&lt;b&gt;\`\*\*h1", "[x](http:&<b>'**h1"),
    ],
)
def test_the_model_card(name, escaped, in_code, tmp_path):
    """The name stands in the title, the table and a sentence; in the code of the base model's name, and in Python."""
    about, report = facts_of_a_run(name, tmp_path)
    args = DFTTrainingArguments(f"{tmp_path}/{name}", use_cpu=True)
    card = check(model_card(about, report, args, TrainerState(log_history=[])))
    python = card[card.index("from transformers") : card.rindex("```")]
    compile(python, "card", "exec")
    prose = card.replace(python, "")
    for form, times in ((escaped, 3), (f"`{in_code}`", 1)):
        assert prose.count(form) == times
        prose = prose.replace(form, "")
    assert not re.search("<b>|h1|2J", prose)
    assert len(re.findall(r"^#", card, re.MULTILINE)) == 6


def facts_of_a_run(name: str, directory: Path) -> tuple[dict, dict]:
    from dataclasses import asdict

    from dft.config.adapters import AdapterConfig
    from dft.config.loss import LossConfig
    from dft.config.metrics import MetricsConfig
    from dft.config.model import ModelConfig

    data = DataConfig([name], eval_data_files=[name])
    groups = {"model": ModelConfig(name), "adapters": AdapterConfig(), "data": data, "dft": LossConfig()}
    settings = {key: asdict(value) for key, value in (groups | {"logging": MetricsConfig()}).items()}
    entry = {"path": name, "rows_read": 1, "kept": 1, "tokens": 1, "supervised_tokens": 1}
    report = {"files": [entry], "total": entry}
    args = DFTTrainingArguments(str(directory), use_cpu=True)
    return about_run(settings, args, report, {"training": 1, "evaluation": 1}), report


class Tags(HTMLParser):
    """Collects the tags of a page."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)


def test_the_data_page_and_sample_rows(tokenizer, tmp_path):
    from data_utils import prepare_data
    from dft.chat.format import ChatFormat
    from dft.data.page import write_page
    from dft.data.report import report_table, report_warnings, show_row

    path = tmp_path / f"<script>{NAME}.jsonl"
    chat = [{"role": "user", "content": f"<script>{ESCAPE}{OVERRIDE}"}, {"role": "assistant", "content": "<i>yes</i>"}]
    write_jsonl(path, [{"messages": chat}, {"messages": []}])
    config = DataConfig([str(path)], validation_split_percentage=0, data_validation="lenient")
    data = prepare_data(config, ChatFormat.of(tokenizer, config))
    write_page(data, tokenizer, tmp_path / "page.html")
    page = check((tmp_path / "page.html").read_text())
    tags = Tags()
    tags.feed(page)
    assert not tags.found & {"script", "i"}
    assert SHOWN in page
    for text in (
        report_table(data.report),
        *report_warnings(data.report),
        show_row(data.samples[0], tokenizer, False),
    ):
        assert SHOWN in check(text)
