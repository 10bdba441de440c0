"""Ask a judge many questions, several times each and several at once."""

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from dft.errors import StoppedEarly, UserError
from dft.judging.endpoint import Reply, RequestFailed
from dft.judging.prompts import Case, compare_messages, score_messages
from dft.judging.replies import ReplyError, parse_scores, parse_verdicts
from dft.judging.rubric import Rubric
from dft.judging.votes import Vote

MAX_UNANSWERED = 20  # requests in a row without a reply, after which a server is taken to be gone
OF_THE_ROW = ("http_400", "http_413", "http_422")  # failures that say nothing of other requests: too long, refused
FAILED_STATUS = 1
SHOWN_REPLY = 200  # characters of a reply that can't be read

Ask = Callable[[list[dict[str, str]], int], Reply]  # messages and seed -> reply; raises RequestFailed


@dataclass(frozen=True)
class Form:
    """A kind of question: how it is put, and how its reply is read."""

    name: str
    messages: Callable[[Case, Rubric], list[dict[str, str]]]
    parse: Callable[[str, Rubric], tuple[dict[str, Any], str]]


SCORE = Form("score", score_messages, parse_scores)
COMPARE = Form("compare", compare_messages, parse_verdicts)


@dataclass(frozen=True)
class Question:
    """What is asked about one row.

    Args:
        key: see question_key.
        cases: {order: what is judged}, the order as in Vote.
    """

    key: str
    cases: dict[str, Case]


@dataclass(frozen=True)
class Poll:
    """How questions are asked.

    Args:
        votes: replies to each question in each order, at least 1.
        seed: of the first vote; the others have the next ones.
        workers: requests at once, at least 1.
    """

    form: Form
    rubric: Rubric
    votes: int = 3
    seed: int = 0
    workers: int = 4

    def __post_init__(self) -> None:
        if self.votes < 1 or self.workers < 1:
            raise UserError("--votes and --workers must be at least 1")

    def question(self, cases: dict[str, Case], asked_with: dict[str, Any]) -> Question:
        """A question with a key that is the same for the same requests, but for their seeds.

        Args:
            asked_with: the model, and what else the replies depend on.
        """
        messages = {order: self.form.messages(case, self.rubric) for order, case in cases.items()}
        text = json.dumps([self.form.name, self.votes, asked_with, messages], sort_keys=True)
        return Question(hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest(), cases)


def ask_all(
    questions: Sequence[Question], poll: Poll, ask: Ask, count: Callable[[Vote], None]
) -> Iterator[tuple[Question, list[Vote]]]:
    """The votes on each question, as soon as it has them all; those of an order by their seeds.

    Args:
        count: is given every vote as it comes.

    Raises:
        StoppedEarly: MAX_UNANSWERED requests in a row had no reply.
    """
    seeds = range(poll.seed, poll.seed + poll.votes)
    jobs = iter([(question, order, seed) for question in questions for order in question.cases for seed in seeds])
    results = _in_threads(jobs, lambda job: _vote(job[0].cases[job[1]], job[1], job[2], poll, ask), poll.workers)
    votes: dict[str, list[Vote]] = {}
    unanswered = 0
    with closing(results):  # no more is asked once this is left
        for (question, _, _), vote in results:
            count(vote)
            if vote.failure not in OF_THE_ROW:
                unanswered = unanswered + 1 if vote.is_unanswered else 0
            if unanswered >= MAX_UNANSWERED:
                raise StoppedEarly(
                    f"stopped: the last {unanswered} requests had no reply ({vote.failure}: {vote.detail})",
                    FAILED_STATUS,
                )
            given = votes.setdefault(question.key, [])
            given.append(vote)
            if len(given) == poll.votes * len(question.cases):
                yield question, sorted(votes.pop(question.key), key=lambda vote: (vote.order, vote.seed))


def _vote(case: Case, order: str, seed: int, poll: Poll, ask: Ask) -> Vote:
    """The vote of one request, which may be a failure."""
    try:
        reply = ask(poll.form.messages(case, poll.rubric), seed)
    except RequestFailed as error:
        return Vote(order, seed, None, failure=error.reason, detail=error.detail)
    tokens = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
    try:
        values, reason = poll.form.parse(reply.text, poll.rubric)
    except ReplyError as error:
        failure = "cut_off" if reply.is_cut else error.reason
        detail = f"{error.detail}: {reply.text[:SHOWN_REPLY]!r}"
        return Vote(order, seed, None, failure=failure, detail=detail, **tokens)
    return Vote(order, seed, values, reason, **tokens)


def _in_threads(jobs: Iterator[Any], work: Callable[[Any], Any], threads: int) -> Iterator[tuple[Any, Any]]:
    """Jobs with their results, as they are done. No job begins once the reader has stopped.

    The threads are daemons: a program that is interrupted doesn't wait for replies that may take minutes.
    """
    lock, stop = threading.Lock(), threading.Event()
    results: queue.SimpleQueue[tuple[Any, Any, BaseException | None]] = queue.SimpleQueue()
    end = object()

    def run() -> None:
        while not stop.is_set():
            with lock:
                job = next(jobs, end)
            if job is end:
                break
            try:
                results.put((job, work(job), None))
            except BaseException as error:  # raised again in the thread that reads
                results.put((job, None, error))
        results.put((end, None, None))

    for _ in range(threads):
        threading.Thread(target=run, daemon=True).start()
    try:
        running = threads
        while running:
            job, result, error = results.get()
            if error is not None:
                raise error
            if job is end:
                running -= 1
            else:
                yield job, result
    finally:
        stop.set()
