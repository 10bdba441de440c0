"""IFD is what two plain forward passes in float64 give, for rows of several turns, whatever shares a batch."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data_utils import load_conversations
from dft.chat.format import ChatFormat
from dft.errors import UserError
from dft.reading.rows import Conversation
from dft.selection import ifd_scores as module
from dft.selection import model_rows
from dft.selection.embeddings import instruction, mean_hidden_states
from dft.selection.ifd import COMMAND, IfdConfig, highest, ifd, rows_of_share
from dft.selection.ifd_scores import answer_pairs, before_answer, ifd_scores
from dft.selection.method import apply
from dft.selection.model_flags import ModelFlags
from dft.selection.scoring_model import ScoringModel, load_scoring_model
from scripts import select_data
from tests.helpers import CHATML_TEMPLATE, run, write_jsonl

HELLO = [{"role": "assistant", "content": "Hello, I am here."}]


def say(*texts: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def conversations(chat_file, tmp_path_factory) -> list[Conversation]:
    """Of one to three turns, with tools, and one that begins with an answer."""
    path = tmp_path_factory.mktemp("more") / "more.jsonl"
    more = write_jsonl(path, [{"messages": HELLO + say("Who?", "Me.", "And?", "Him.", "So?", "No.")}])
    return [*load_conversations([str(chat_file)]), *load_conversations([str(more)])]


@pytest.fixture(scope="module")
def model(tiny_model) -> ScoringModel:
    return load_scoring_model(tiny_model, "cpu")


def reference(row: Conversation, model: ScoringModel) -> tuple[float, float]:
    """s(A | Q) and s(A), by logits in float64 of the conversation and of each answer's text."""
    exact = copy.deepcopy(model.model).double()
    exact.set_attn_implementation("eager")
    example = ChatFormat(model.tokenizer).encode(row.messages, row.tools)
    ids = torch.tensor(example.input_ids).long()
    runs, previous = [], False
    for i, label in enumerate(example.labels.tolist()):
        if label >= 0:
            runs[-1].append(i) if previous else runs.append([i])
        previous = label >= 0
    if row.messages[0]["role"] == "assistant":
        runs = runs[1:]
    header = model.tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    sums, count = np.zeros(2), 0
    for places in runs:
        alone = torch.cat([torch.tensor(header), ids[places]])
        for number, (row_ids, start) in enumerate([(ids, places[0]), (alone, len(header))]):
            log_p = exact(row_ids[None]).logits[0].log_softmax(-1)
            for i in range(start, start + len(places)):
                sums[number] -= float(log_p[i - 1, row_ids[i]])
        count += len(places)
    return sums[0] / count, sums[1] / count


def error(found: module.IfdScores, expected: np.ndarray) -> float:
    """The largest relative error of the scores of all rows, expected as [R, 2]."""
    scores = np.stack([found.with_instruction, found.alone], axis=1)
    return float(np.abs(scores / expected - 1).max())


@pytest.fixture(scope="module")
def expected(conversations, model) -> np.ndarray:
    with torch.no_grad():
        return np.array([reference(row, model) for row in conversations])


def test_scores_are_those_of_two_plain_passes(conversations, model, expected, tmp_path):
    found = ifd_scores(conversations, model, cache=tmp_path)
    assert not found.refusals
    assert {len(row.messages) for row in conversations} == {3, 4, 7}
    assert error(found, expected) < 1e-5
    np.testing.assert_allclose(found.ratio, expected[:, 0] / expected[:, 1], rtol=1e-5)


@pytest.mark.parametrize("tokens_at_once", [1, 300])
def test_the_size_of_batches_changes_nothing(conversations, model, expected, tokens_at_once, tmp_path):
    assert error(ifd_scores(conversations, model, tokens_at_once=tokens_at_once, cache=tmp_path), expected) < 1e-5


def test_padded_batches_give_the_same(conversations, model, expected, tmp_path):
    padded = ScoringModel(model.name, model.model, model.base, model.tokenizer, model.device, is_padded=True)
    assert error(ifd_scores(conversations, padded, cache=tmp_path), expected) < 1e-5


def test_an_adapter_scores_as_the_model_with_it_merged(conversations, model, expected, tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    model.tokenizer.save_pretrained(tmp_path / "merged")
    found = [
        ifd_scores(conversations[:20], load_scoring_model(tmp_path / name, "cpu"), cache=tmp_path / "cache")
        for name in ("adapter", "merged")
    ]
    np.testing.assert_allclose(found[0].ratio, found[1].ratio, rtol=1e-4)
    assert np.abs(found[0].alone / expected[:20, 1] - 1).max() > 1e-3  # the adapter changes the model
    texts = [instruction(row) for row in conversations[:20]]
    hidden = [
        mean_hidden_states(texts, load_scoring_model(tmp_path / name, "cpu"), cache=tmp_path / "cache")
        for name in ("adapter", "merged")
    ]
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=1e-3, atol=1e-4)


def sees_instruction(example, skipped, before):
    row, alone = REAL_PAIR(example, skipped, before)
    start = int(np.flatnonzero(row["labels"] >= 0)[0])
    prompt = row["input_ids"][:start]
    first = alone[0]["labels"][len(before) :]
    nothing = np.full(start, -100, dtype=np.int32)
    alone[0] = {"input_ids": np.concatenate([prompt, first]), "labels": np.concatenate([nothing, first])}
    return row, alone


def one_token_late(example, skipped, before):
    row, alone = REAL_PAIR(example, skipped, before)
    for part in alone:
        part["labels"] = part["labels"].copy()
        part["labels"][len(before)] = -100
    return row, alone


def without_header(example, skipped, before):
    return REAL_PAIR(example, skipped, before[:1])


REAL_PAIR = module._pair


@pytest.mark.parametrize("mutant", [sees_instruction, one_token_late, without_header])
def test_the_comparison_rejects_another_second_pass(conversations, model, expected, mutant, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_pair", mutant)
    assert error(ifd_scores(conversations, model, cache=tmp_path), expected) > 1e-3


def test_both_passes_predict_the_same_tokens(conversations, model):
    pairs, _ = answer_pairs(conversations, ChatFormat(model.tokenizer), 8192)
    for row, alone in pairs.values():
        in_alone = np.concatenate([part["labels"][part["labels"] >= 0] for part in alone])
        assert row["labels"][row["labels"] >= 0].tolist() == in_alone.tolist()


def test_what_stands_before_an_answer_is_found_in_other_templates(tokenizer):
    tokenizer.chat_template = CHATML_TEMPLATE  # with a default system prompt
    assert tokenizer.decode(before_answer(ChatFormat(tokenizer))) == "<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = "<bos>" + CHATML_TEMPLATE
    assert tokenizer.decode(before_answer(ChatFormat(tokenizer))) == "<bos><|im_end|>\n<|im_start|>assistant\n"


def test_cut_rows_are_scored_by_what_is_left(conversations, model, tmp_path):
    found = ifd_scores(conversations, model, max_length=40, cache=tmp_path)
    assert {refusal.reason for refusal in found.refusals.values()} <= {
        "no_instruction",
        "nothing_left_after_truncation",
    }
    assert found.refusals
    assert np.isfinite(found.ratio).any()
    assert np.isnan(found.ratio[list(found.refusals)]).all()


def test_a_run_that_was_cut_goes_on_from_its_shards(conversations, model, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(model_rows, "SHARD_TOKENS", 500)
    ifd_scores(conversations, model, cache=tmp_path)
    shards = sorted(tmp_path.glob("*/*.npz"))
    assert len(shards) > 3
    shards[1].unlink()
    shards[2].write_bytes(b"cut")
    calls = []
    monkeypatch.setattr(ScoringModel, "log_p", lambda self, rows: calls.append(len(rows)) or LOG_P(self, rows))
    assert error(ifd_scores(conversations, model, cache=tmp_path), expected) < 1e-5
    assert len(calls) == 2
    ifd_scores(conversations, model, cache=tmp_path, max_length=50)
    assert len(calls) > 4  # other rows


LOG_P = ScoringModel.log_p


def test_rows_without_an_instruction_are_dropped(model, tmp_path, tiny_model):
    rows = [{"messages": HELLO}, {"messages": say("Who?", "Me.")}, {"messages": say("  ", "Me.")}]
    conversations = list(load_conversations([str(write_jsonl(tmp_path / "rows.jsonl", rows))]))
    config = IfdConfig(ModelFlags(tiny_model, device="cpu", cache_dir=tmp_path / "cache"), max_ratio=99)
    kept, dropped = apply(conversations, ifd(config))
    assert [row.line for row in kept] == [2]
    assert [(row.line, row.reason) for row in dropped] == [(1, "no_instruction"), (3, "no_instruction")]
    with pytest.raises(UserError, match="no row has an answer to an instruction"):
        apply(conversations[:1], ifd(config))


def test_the_highest_are_those_that_come_first_of_equal_ones():
    scores = np.array([0.5, np.nan, 0.9, 0.5, 2.0, 0.1])
    assert np.flatnonzero(highest(scores, scores < 1, 2)).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_share": 0.0}, "--keep_share 0 must be"),
        ({"min_ratio": 1.0}, "--min_ratio 1 and --max_ratio 1"),
        ({"max_ratio": float("nan")}, "--max_ratio nan"),
        ({"max_length": 0}, "--max_length is 0"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        IfdConfig(ModelFlags(tmp_path), **settings)


def test_a_directory_that_is_not_there_is_refused_before_a_row_is_read(tmp_path, chat_file):
    flags = ["--model", str(tmp_path / "none"), "--data_files", str(chat_file), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--model .*none is not a directory"):
        select_data.main(["ifd", *flags])


@pytest.mark.launch
def test_the_program_on_two_processes_writes_what_one_writes(tiny_model, chat_file, tmp_path):
    flags = ["--model", tiny_model, "--data_files", chat_file, "--keep_share", "0.25", "--max_ratio", "3"]
    select_data.main(
        ["ifd", *map(str, flags), "--output", str(tmp_path / "one"), "--cache_dir", str(tmp_path / "cache_1")]
    )
    launcher = ["torchrun", "--standalone", "--nproc-per-node", "2", "scripts/select_data.py", COMMAND.name]
    result = run([*launcher, *flags, "--output", tmp_path / "two", "--cache_dir", tmp_path / "cache_2"])
    assert result.returncode == 0, result.stdout[-3000:]
    report = json.loads((tmp_path / "two" / "selection_report.json").read_text())
    assert report["total"]["kept"] == 10
    assert report["total"]["rows_read"] == 40
    kept = [(tmp_path / name / "kept" / f"{chat_file.stem}.jsonl").read_text() for name in ("one", "two")]
    assert kept[0] == kept[1]
    assert len(kept[0].splitlines()) == 10
    lines = [(tmp_path / name / "scores.jsonl").read_text().splitlines() for name in ("one", "two")]
    scores = [[json.loads(line)["ifd"] for line in part] for part in lines]
    assert len(scores[0]) == 40
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_a_share_is_that_of_the_number_as_it_is_written():
    """0.07 * 100 is 7.000000000000001."""
    for per_cent in range(1, 101):
        assert rows_of_share(per_cent / 100, 100) == per_cent
    assert [rows_of_share(0.07, count) for count in (0, 1, 14, 15)] == [0, 1, 1, 2]
    assert rows_of_share(1e-05, np.int64(100_000)) == 1
