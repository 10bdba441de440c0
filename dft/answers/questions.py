"""Questions: prompts of evaluation rows, each with its reference answer, a scorer and the place that it comes from.

A row's last assistant turn is asked for, with all that stands before it as the prompt; where tool calls are scored by
name, the last turn that calls a tool. The rows are the same for any number of ranks.

Shapes: R rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dft.answers.calls import calls_of
from dft.answers.scorers import THINKING, Scorer, choose_scorer, final_text, make_scorer, read_calls, same_value
from dft.chat.format import ChatFormat
from dft.config.answers import AUTO, scorer_of
from dft.config.data import DataConfig
from dft.data.channels import file_names
from dft.data.prepared import PreparedData, RowPlaces
from dft.errors import UserError
from dft.model.trained import turn_end_token
from dft.printable import printable
from dft.reading.formats import RowReader
from dft.reading.raw_rows import read_rows
from dft.reading.rows import Conversation, RejectedRow, RowError

TOOL_CALL = "tool_call"


@dataclass(frozen=True)
class Question:
    """A prompt, and what the answer is compared with.

    Attributes:
        prompt: ids, int32 [T], with the generation prompt.
        messages: what stands before the answer, with role and content.
        reference: the row's own answer, as the template writes it, without its end.
        thinking: the tag of a thinking block that the prompt opens, "" for none.
        source: the channel of the row, or the short name of its file.
        place: FILE:LINE.
    """

    prompt: np.ndarray
    messages: list[dict[str, Any]]
    reference: str
    thinking: str
    scorer: Scorer
    source: str
    place: str

    @property
    def asked(self) -> str:
        """The last message before the answer, for people."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Questions:
    """Questions of some rows, and why the others can't be asked: their places with the errors."""

    questions: list[Question]
    refusals: list[tuple[str, RowError]]

    @property
    def groups(self) -> list[tuple[str, str]]:
        """The sources, each with a scorer of its questions, sorted."""
        return sorted({(question.source, question.scorer.name) for question in self.questions})


def questions_of_data(
    data: PreparedData,
    config: DataConfig,
    chat_format: ChatFormat,
    scorers: dict[str, str],
    count: int | None,
    room: int,
    *,
    of_training: bool = False,
) -> Questions:
    """The questions of `count` evaluation rows, as many of each source; of all rows where count is None.

    Args:
        scorers: {source or pattern: scorer}, see dft.config.answers.
        room: tokens of the longest prompt that is asked.
        of_training: of training rows instead.

    Raises:
        UserError: no row can be asked, or a file has been changed.
    """
    places = data.train_places if of_training else data.evaluation_places
    names, number = _sources(data, of_training=of_training)
    chosen = choose_rows(number, count)
    conversations = read_conversations(data.report["files"], places, chosen, config.roles)
    sources = [names[i] for i in number[chosen].tolist()]
    found = make_questions(conversations, sources, chat_format, scorers, room)
    if not found.questions:
        place, error = found.refusals[0]
        raise UserError(f"none of the {len(chosen)} chosen rows can be asked; {printable(place)}: {error.detail}")
    return found


def source_names(data: PreparedData, *, of_training: bool = False) -> list[str]:
    """The names of the sources that there are evaluation rows of, or training rows."""
    names, number = _sources(data, of_training=of_training)
    return [names[i] for i in np.unique(number).tolist()]


def _sources(data: PreparedData, *, of_training: bool) -> tuple[list[str], np.ndarray]:
    """Names of sources, and the source of each row, int [R]: the channels, or else the files.

    The rows of a file may all name one source: it gets no metrics of its own, but its name still chooses the scorer.
    """
    rows, places = (data.train, data.train_places) if of_training else (data.evaluation, data.evaluation_places)
    if data.channels:
        return data.channels, np.asarray(rows["channel"])
    files = file_names([entry["path"] for entry in data.report["files"]])
    has_one_name = len(files) == 1 and len(data.field_names) == 1 and data.field_names[0] != ""
    return data.field_names if has_one_name else files, places.file


def choose_rows(source: np.ndarray, count: int | None) -> np.ndarray:
    """The places of `count` rows, or of all, sorted, int64: as many of each source, spread evenly over its rows.

    Args:
        source: int [R].
    """
    if count is None or count >= len(source):
        return np.arange(len(source))
    members = [np.flatnonzero(source == name) for name in np.unique(source)]
    shares, left = np.zeros(len(members), dtype=np.int64), count
    while left > 0:
        for i, rows in enumerate(members):
            if left > 0 and shares[i] < len(rows):
                shares[i] += 1
                left -= 1
    spread = [
        rows[np.arange(share) * len(rows) // share] for rows, share in zip(members, shares, strict=True) if share
    ]
    return np.sort(np.concatenate(spread))


def read_conversations(
    files: Sequence[dict[str, Any]], places: RowPlaces, chosen: np.ndarray, role_map: dict[str, str]
) -> list[Conversation]:
    """The chosen rows, read from their files again.

    Args:
        files: see dft.data.report.make_report.
        chosen: indices into the places.

    Raises:
        UserError: a file has been changed since.
    """
    found: dict[int, Conversation] = {}
    for number in np.unique(places.file[chosen]).tolist():
        reader = RowReader(files[number]["path"], files[number]["format"], role_map)
        of_ordinal = {int(places.ordinal[i]): int(i) for i in chosen if places.file[i] == number}
        last = max(of_ordinal)
        for ordinal, raw in enumerate(read_rows(reader.path)):
            if ordinal in of_ordinal:
                row = reader.read(raw)
                if isinstance(row, RejectedRow):
                    break
                found[of_ordinal[ordinal]] = row
            if ordinal == last:
                break
        if any(i not in found for i in of_ordinal.values()):
            raise UserError(f"{printable(reader.path)} was changed while it was being read")
    return [found[int(i)] for i in chosen]


def make_questions(
    rows: Sequence[Conversation], sources: Sequence[str], chat_format: ChatFormat, scorers: dict[str, str], room: int
) -> Questions:
    """The questions of some conversations; see questions_of_data.

    Args:
        sources: the name of each row's.
    """
    ends = {chat_format.tokenizer.eos_token_id, turn_end_token(chat_format)} - {None}
    questions: list[Question] = []
    refusals: list[tuple[str, RowError]] = []
    for row, source in zip(rows, sources, strict=True):
        place = f"{row.path}:{row.line}"
        try:
            questions.append(_question(row, source, place, chat_format, scorer_of(source, scorers), room, ends))
        except RowError as error:
            refusals.append((place, error))
    return Questions(questions, refusals)


def _question(
    row: Conversation, source: str, place: str, chat_format: ChatFormat, scorer: str, room: int, ends: set[int]
) -> Question:
    messages = _up_to_last_call(row) if scorer == TOOL_CALL else row.up_to_last_answer()
    if len(messages) < 2:
        raise RowError("no_question", "nothing stands before the answer")
    prompt = chat_format.prompt(messages, row.tools, row.template_kwargs)
    if len(prompt) > room:
        raise RowError(
            "prompt_too_long", f"the prompt has {len(prompt)} tokens; with its answer the model takes {max(room, 0)}"
        )
    answer = chat_format.last_turn(messages, row.tools, row.template_kwargs).tolist()
    length = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    tokenizer = chat_format.tokenizer
    reference, text = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (answer[:length], prompt.tolist()))
    return Question(
        prompt,
        messages=messages[:-1],
        reference=reference,
        thinking=next((tag for tag in THINKING if text.rstrip().endswith(tag)), ""),
        scorer=_scorer(scorer, reference, messages[-1]),
        source=source,
        place=place,
    )


def _up_to_last_call(row: Conversation) -> list[dict[str, Any]]:
    """The messages up to the last one that calls a tool; up to the last answer where none does."""
    calling = [i for i, message in enumerate(row.messages) if message.get("tool_calls")]
    return row.messages[: calling[-1] + 1] if calling else row.up_to_last_answer()


def _scorer(name: str, reference: str, message: dict[str, Any]) -> Scorer:
    """The scorer of a question.

    Raises:
        RowError: no answer could be right.
    """
    calls = calls_of(message)
    are_read = same_value(read_calls(reference), calls)
    if name == AUTO:
        name = choose_scorer(reference, has_calls=bool(calls) and are_read)
    scorer = make_scorer(name)
    if name == TOOL_CALL and not are_read:
        raise RowError("calls_not_read", "the chat template writes tool calls in a form that isn't read from text")
    if not scorer.can_score(reference):
        raise RowError(
            "reference_not_scored", f"{name} finds nothing in the row's own answer {final_text(reference)!r:.60}"
        )
    return scorer
