"""A model that was taught its answers is right where the references are those, and wrong where they are others."""

import dataclasses
import json
import re

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from data_utils import load_conversations, prepare_data
from dft import generation
from dft.answers.asking import answer_metrics, ask, record_of
from dft.answers.questions import choose_rows, make_questions, questions_of_data, read_conversations, source_names
from dft.answers.report import answers_table, refusal_lines, sample_lines
from dft.chat.format import ChatFormat
from dft.config.data import DataConfig
from dft.data.prepared import RowPlaces
from dft.errors import UserError
from dft.generation import share_answers
from dft.model.trained import find_end_tokens
from tests.answers.lessons import ANSWERS, ROWS, SCORERS, WRONG_ROWS, call
from tests.helpers import CHATML_TEMPLATE, THINKING_TEMPLATE, write_jsonl

ROOM = 1000


@pytest.fixture
def questions_of(tokenizer, tmp_path):
    """The questions of rows that are written to a file."""

    def make(rows, scorers=None, room=ROOM):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        conversations = list(load_conversations([str(path)]))
        sources = [row.channel for row in conversations]
        return make_questions(conversations, sources, ChatFormat(tokenizer), scorers or {}, room)

    return make


@pytest.fixture
def answers_to(taught_model, tokenizer, questions_of):
    def answer(rows, max_new_tokens=60, **settings):
        questions = questions_of(rows).questions
        ends = find_end_tokens(taught_model, tokenizer)
        return ask(taught_model, tokenizer, questions, max_new_tokens, ends, **settings)

    return answer


def test_the_answers_that_were_taught_are_right_and_others_are_wrong(answers_to):
    right, wrong = answers_to(ROWS), answers_to(WRONG_ROWS)
    of_groups = {f"answers/{source}/{scorer}": 1.0 for source, scorer in SCORERS.items()}
    lengths = {"answers/mean_tokens": np.mean([answer.num_tokens for answer in right])}
    assert answer_metrics(right) == {"answers/score": 1.0, "answers/ended": 1.0} | lengths | of_groups
    assert answer_metrics(wrong) == {"answers/score": 0.0, "answers/ended": 1.0} | lengths | dict.fromkeys(
        of_groups, 0.0
    )
    assert [answer.text for answer in right] == [answer.text for answer in wrong]
    assert right[0].text == "Paris."
    half = answer_metrics(answers_to([*ROWS[:1], *WRONG_ROWS[1:]]))
    assert (half["answers/score"], half["answers/facts/exact"]) == (1 / 8, 0.5)


def test_an_answer_that_is_cut_has_not_ended(answers_to):
    metrics = answer_metrics(answers_to(ROWS, max_new_tokens=1))
    assert (metrics["answers/ended"], metrics["answers/mean_tokens"], metrics["answers/score"]) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("tokens_at_once", [1, 150, 10_000])
def test_batches_change_nothing(answers_to, tokens_at_once):
    texts = [answer.text for answer in answers_to(ROWS, tokens_at_once=tokens_at_once)]
    assert texts == [answer.text for answer in answers_to(ROWS)]


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_ranks_share_the_prompts_and_make_as_many_calls(world, taught_model, tokenizer, questions_of, monkeypatch):
    """Ranks one after the other, with what they would gather; of nine, one has no prompt of its own."""
    prompts = [question.prompt for question in questions_of(ROWS).questions]
    calls, found = [], []
    generate = generation.Generator.generate
    monkeypatch.setattr(generation.dist, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(generation.dist, "get_world_size", lambda: world)

    def counted(self, batch):
        assert self.in_step
        calls[-1].append(len(batch))
        return generate(dataclasses.replace(self, in_step=False), batch)

    monkeypatch.setattr(generation.Generator, "generate", counted)
    for gathers in (False, True):
        for rank in range(world):
            calls.append([])
            monkeypatch.setattr(generation.dist, "get_rank", lambda rank=rank: rank)

            def gather(mine, is_last=gathers):
                found.append(mine)
                return found[:world] if is_last else [{i: [] for i in range(len(prompts))}, mine]

            monkeypatch.setattr(generation, "gather_in_training", gather)
            ends = find_end_tokens(taught_model, tokenizer)
            answers = share_answers(taught_model, tokenizer, prompts, 60, ends, tokens_at_once=150, in_step=True)
    assert len({len(of_rank) for of_rank in calls}) == 1
    assert [tokenizer.decode(ids[:-1]) for ids in answers] == [
        answer if isinstance(answer, str) else tokenizer.decode(ids[:-1])
        for (_, _, answer), ids in zip(ANSWERS, answers, strict=True)
    ]
    if 1 < world < 9:  # every prompt is answered by one rank alone
        assert sum(map(len, found[:world])) == len(prompts)


def test_an_adapter_is_asked_as_its_model_is(taught_model, tokenizer, questions_of):
    """A new adapter changes nothing."""
    questions = questions_of(ROWS).questions
    ends = find_end_tokens(taught_model, tokenizer)
    adapted = get_peft_model(taught_model, LoraConfig(target_modules=["q_proj"]))
    answers = ask(adapted, tokenizer, questions, 60, ends)
    assert all(answer.is_right for answer in answers)


def test_records_and_reports_say_what_was_asked_and_answered(answers_to, tokenizer):
    answers = answers_to([*ROWS[:7], conversation_with_escapes()])
    record = json.loads(json.dumps(record_of(answers[0], tokenizer)))
    assert record.pop("place").endswith("rows.jsonl:1")
    assert record.pop("tokens") == answers[0].num_tokens
    assert record == {
        "source": "facts",
        "prompt": "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n",
        "asked": "Capital of France?",
        "reference": "Paris.",
        "answer": "Paris.",
        "scorer": "exact",
        "is_right": True,
        "has_ended": True,
    }
    table = [line.split() for line in answers_table(answers)]
    assert table[0] == "answers scored by rows score ended mean tokens".split()
    assert table[1][:3] == ["all", "8", "0.8750"]
    assert ["sums", "last_number", "2", "1.0000", "1.0000"] in [line[:5] for line in table]
    shown = sample_lines(answers)
    assert len(shown) == 12
    assert shown[1] == "  question   Capital of France?"
    assert shown[0].endswith("rows.jsonl:1 (right by exact)")
    assert not any("\x1b" in line or "\n" in line for line in shown + answers_table(answers))


def conversation_with_escapes():
    messages = [{"role": "user", "content": "a\x1b[31m\nb" * 100}, {"role": "assistant", "content": "\x1b"}]
    return {"messages": messages, "channel": "facts"}


# ---- questions ----------------------------------------------------------------------------------


def test_rows_are_chosen_evenly_over_the_sources():
    source = np.array([0] * 100 + [1] * 3 + [2] * 50)
    chosen = choose_rows(source, 33)
    assert np.bincount(source[chosen]).tolist() == [15, 3, 15]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen[:3].tolist() == [0, 6, 13]
    assert choose_rows(source, 2).tolist() == [0, 100]
    assert choose_rows(source, None).tolist() == choose_rows(source, 999).tolist() == list(range(153))


def test_the_last_turn_is_asked_for_and_of_tools_the_last_call(questions_of):
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            call("weather", city="Bonn"),
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "Rain."},
            {"role": "user", "content": "Thanks"},
        ]
    }
    (question,) = questions_of([row]).questions
    assert (question.asked, question.reference, question.scorer.name) == ("rain", "Rain.", "exact")
    (question,) = questions_of([row], {"*": "tool_call"}).questions
    assert question.asked == "Weather?"
    assert question.scorer.is_right('{"name": "weather", "arguments": {"city": "Bonn"}}', question.reference)


def test_rows_that_can_not_be_asked_are_named(questions_of):
    long = {"messages": [{"role": "user", "content": "word " * 600}, {"role": "assistant", "content": "7"}]}
    alone = {"messages": [{"role": "assistant", "content": "7"}]}
    text = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    fine = {"messages": [{"role": "user", "content": "2 + 5"}, {"role": "assistant", "content": "7"}]}
    found = questions_of([long, alone, text, fine], {"*": "last_number"})
    assert [question.place.rpartition(":")[2] for question in found.questions] == ["4"]
    assert [error.reason for _, error in found.refusals] == ["prompt_too_long", "no_question", "reference_not_scored"]
    lines = refusal_lines(found)
    assert lines[0] == "3 of the 4 chosen rows can't be asked:"
    assert re.search(r"rows.jsonl:1: the prompt has \d{4} tokens; with its answer the model takes 1000$", lines[1])
    assert refusal_lines(questions_of([fine])) == []


def test_calls_that_a_template_writes_in_its_own_way(questions_of, tokenizer):
    """They are compared as text by auto, and refused where tool_call is asked for."""
    own = CHATML_TEMPLATE.replace(
        "(call.function | tojson)", "call.function.name + ' ' + call.function.arguments.city"
    )
    tokenizer.chat_template = own
    row = {"messages": [{"role": "user", "content": "Weather?"}, call("weather", city="Bonn")]}
    assert questions_of([row]).questions[0].scorer.name == "exact"
    assert [e.reason for _, e in questions_of([row], {"*": "tool_call"}).refusals] == ["calls_not_read"]


def test_thinking_that_the_prompt_opens_is_no_answer(questions_of, tokenizer):
    tokenizer.chat_template = THINKING_TEMPLATE + (
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    )
    thinks = {"role": "assistant", "content": "12", "reasoning_content": "6 and 6"}
    (question,) = questions_of([{"messages": [{"role": "user", "content": "6 + 6"}, thinks]}]).questions
    assert (question.thinking, question.scorer.name) == ("<think>", "last_number")
    assert question.scorer.is_right(question.thinking + "so 11\n</think>\n\n12", question.reference)
    assert not question.scorer.is_right(question.thinking + "6 and 6 is 12", question.reference)


def test_rows_are_found_again_in_files_of_every_kind(tokenizer, tmp_path):
    """Rows of a JSON array may share a line."""
    array, lines = tmp_path / "array.json", tmp_path / "lines.jsonl"
    array.write_text(json.dumps(ROWS))
    write_jsonl(lines, [{"messages": []}, *WRONG_ROWS])
    files = [str(lines), str(array)]
    config = DataConfig(files, eval_data_files=[str(array)], data_validation="lenient", data_cache_dir=str(tmp_path))
    chat_format = ChatFormat(tokenizer)
    data = prepare_data(config, chat_format, progress=False)
    found = questions_of_data(data, config, chat_format, {}, None, ROOM)
    assert [question.asked for question in found.questions] == [question for _, question, _ in ANSWERS]
    assert {question.place for question in found.questions} == {f"{array}:1"}
    assert source_names(data) == sorted(SCORERS)
    trained = questions_of_data(data, config, chat_format, {}, 4, ROOM, of_training=True)
    assert [question.source for question in trained.questions] == ["facts", "sums", "forms", "tools"]
    with pytest.raises(UserError, match=r"none of the 8 chosen rows can be asked; .*array.json:1: the prompt has"):
        questions_of_data(data, config, chat_format, {}, None, 3)
    array.write_text("[]")
    with pytest.raises(UserError, match="array.json was changed while it was being read"):
        questions_of_data(data, config, chat_format, {}, None, ROOM)


def test_a_file_that_was_changed_is_not_read_on(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"messages": "broken"}])
    places = RowPlaces(np.zeros(2, dtype=np.int32), np.arange(2))
    files = [{"path": str(path), "format": "messages"}]
    assert len(read_conversations(files, places, np.array([0]), {})) == 1
    with pytest.raises(UserError, match="was changed"):
        read_conversations(files, places, np.array([0, 1]), {})
