"""The output file: what was written is read again, and nothing else is touched."""

import pytest

from dft.errors import UserError
from dft.judging.judgments import Judgments
from dft.judging.votes import Vote
from tests.helpers import FULL, needs_full_disk

VOTES = [Vote("", 0, {"right": 4}, "so \ud800 …"), Vote("", 1, None, failure="timeout", detail="60 s")]


def test_votes_are_kept(tmp_path):
    path = tmp_path / "judged.jsonl"
    Judgments(path).add("k", {"line": 3}, VOTES)
    again = Judgments(path)
    assert again.votes["k"][1] == VOTES[1]
    again.add("l", {}, VOTES[:1])
    again.add("k", {}, VOTES[1:])
    assert {key: len(votes) for key, votes in Judgments(path).votes.items()} == {"k": 1, "l": 1}


@pytest.mark.parametrize("cut", [1, 12, 60])
def test_a_line_that_a_stopped_run_left_is_dropped(tmp_path, cut):
    path = tmp_path / "judged.jsonl"
    Judgments(path).add("k", {}, VOTES[1:])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-cut].replace(b'"k"', b'"l"'))
    again = Judgments(path)
    assert set(again.votes) == {"k"}
    again.add("m", {}, VOTES[1:])
    assert set(Judgments(path).votes) == {"k", "m"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"prompt": "a"}\n', 1),
        ('{"prompt": "a"}', 1),
        ("{}", 1),
        ('{"key": "k", "votes": []}\n\n', 2),
        ('{"key": "k", "votes": []}\nmy notes', 2),
        ('{"key": "k", "votes": [{"seed": 0, "colour": 1}]}\n', 1),
        ('{"key": "k", "votes": 3}\n', 1),
        ("\xff\n", 1),
    ],
)
def test_another_file_is_refused_and_left_as_it_is(tmp_path, text, line):
    path = tmp_path / "notes.txt"
    path.write_text(text, encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"notes.txt:{line} isn't a line that a judge has written"):
        Judgments(path)
    assert path.read_bytes() == before


def test_an_output_that_can_not_be_written(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "judged.jsonl"):
        with pytest.raises(UserError, match="--output .* can't be written"):
            Judgments(path)


@needs_full_disk
def test_a_full_disk(tmp_path):
    judgments = Judgments(tmp_path / "judged.jsonl")
    judgments.path = FULL
    with pytest.raises(UserError, match="--output /dev/full can't be written: No space left on device"):
        judgments.add("k", {}, VOTES)


def test_without_an_output_votes_are_kept_in_memory():
    judgments = Judgments(None)
    judgments.add("k", {}, VOTES)
    assert judgments.votes == {"k": VOTES}
