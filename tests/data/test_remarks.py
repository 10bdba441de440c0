"""What templates leave out, and what else is remarkable in rows, is counted for each file and shown to people."""

import pytest

from data_utils import prepare_data
from dft.chat.format import ChatFormat
from dft.config.data import DataConfig
from dft.data.page import write_page
from dft.data.report import report_cells, report_notes
from tests.chat.test_masks import assistant, user
from tests.helpers import THINKING_TEMPLATE, write_jsonl

THINKS = assistant("6", reasoning_content="2 x 3 is 6.")
ROWS = {
    "thinking": [[user("2 x 3?"), THINKS] * 3, [user("2 x 3?"), THINKS] * 2],  # 2 turns and 1 turn lose theirs
    "empty": [[user("Q"), assistant(""), user("Q"), assistant("A")], [user("Q") | {"mood": "sad"}, assistant("A")]],
}


@pytest.fixture
def prepared(tokenizer, tmp_path):
    """Prepares the rows with the flags given."""
    tokenizer.chat_template = THINKING_TEMPLATE
    files = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": row} for row in rows]))
        for name, rows in ROWS.items()
    ]

    def prepare(**flags):
        directory = str(tmp_path / "cache")
        config = DataConfig(
            files, validation_split_percentage=0.0, preprocessing_num_workers=1, data_cache_dir=directory, **flags
        )
        return prepare_data(config, ChatFormat.of(tokenizer, config), progress=False)

    return prepare


def test_remarks_are_counted_for_each_file_in_report_table_notes_and_page(prepared, tokenizer, tmp_path):
    data = prepared()
    thinking, empty = (entry["remarks"] for entry in data.report["files"])
    assert thinking == {"turns_without_thinking": 3}
    assert empty == {"empty_turns": 1, "unread_key:mood": 1}
    assert data.report["total"]["remarks"] == thinking | empty
    header, *lines = report_cells(data.report)
    assert header[-2:] == ("thinking lost", "empty turns")
    assert [line[-2:] for line in lines] == [("3", "0"), ("0", "1"), ("3", "1")]
    notes = "\n".join(report_notes(data.report))
    assert "leaves out the thinking of 3 supervised turns" in notes
    assert "1 supervised turns say nothing" in notes
    assert "reads the key 'mood' of messages, in 1 rows" in notes
    write_page(data, tokenizer, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "thinking lost" in page
    assert "leaves out the thinking of 3 supervised turns" in page


def test_the_table_has_no_columns_for_what_does_not_occur(prepared):
    header, *_ = report_cells(prepared(empty_turns="skip_turn", mask_thinking=True).report)
    assert header[-1] == "padding"


def test_flags_of_empty_turns_prepare_the_data_anew(prepared):
    supervised = {name: prepared(empty_turns=name).report["total"] for name in ("keep", "skip_turn", "drop_row")}
    assert supervised["drop_row"]["rejected"] == {"empty_turn": 1}
    assert supervised["keep"]["supervised_tokens"] > supervised["skip_turn"]["supervised_tokens"]
    assert supervised["keep"]["kept"] == supervised["skip_turn"]["kept"] == 4


def test_arguments_of_the_chat_template_prepare_the_data_anew(prepared):
    assert prepared().directory != prepared(chat_template_kwargs='{"enable_thinking": false}').directory
