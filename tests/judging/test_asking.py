"""Many questions at once: every vote is cast once, failures are no votes, and a server that is gone ends the run."""

import json
import threading
from collections import Counter

import pytest

from dft.errors import StoppedEarly, UserError
from dft.judging.asking import COMPARE, MAX_UNANSWERED, SCORE, Poll, ask_all
from dft.judging.endpoint import Reply, RequestFailed
from dft.judging.prompts import Case


def case(*answers: str) -> Case:
    return Case(({"role": "user", "content": "?"},), answers)


def reply(score: int) -> Reply:
    return Reply(json.dumps({"scores": {"right": score, "brief": 5}}), False, 10, 5)


def questions(poll: Poll, count: int) -> list:
    return [poll.question({"": case(f"answer {i}")}, {"model": "m"}) for i in range(count)]


def ignore(vote) -> None:
    pass


@pytest.mark.parametrize("workers", [1, 7])
def test_every_vote_is_cast_once(rubric, workers):
    """Each question has its own votes, in the order of their seeds, whichever reply comes first."""
    poll = Poll(SCORE, rubric, votes=3, seed=5, workers=workers)
    asked, counted = Counter(), []

    def ask(messages, seed):
        number = messages[1]["content"].split("answer ")[1][0]
        asked[number, seed] += 1
        return reply(1 + (int(number) + seed) % 5)

    all_questions = questions(poll, 5)
    found = {question.key: votes for question, votes in ask_all(all_questions, poll, ask, counted.append)}
    assert asked == {(str(i), seed): 1 for i in range(5) for seed in (5, 6, 7)}
    assert len(counted) == 15
    for i, question in enumerate(all_questions):
        votes = found[question.key]
        assert [(vote.seed, vote.values["right"]) for vote in votes] == [(s, 1 + (i + s) % 5) for s in (5, 6, 7)]
        assert {(vote.prompt_tokens, vote.completion_tokens) for vote in votes} == {(10, 5)}


def test_requests_are_made_at_once(rubric):
    """Rejects one worker whatever --workers says: this waits for three requests at the same time."""
    poll = Poll(SCORE, rubric, votes=3, workers=3)
    meeting = threading.Barrier(3, timeout=60)

    def ask(messages, seed):
        meeting.wait()
        return reply(4)

    assert len(list(ask_all(questions(poll, 2), poll, ask, ignore))) == 2


def test_both_orders_are_asked(rubric):
    poll = Poll(COMPARE, rubric, votes=2)
    seen = []

    def ask(messages, seed):
        text = messages[1]["content"]
        seen.append((text.index("good") < text.index("poor"), seed))
        return Reply(json.dumps({"verdicts": {"right": "first", "brief": "tie"}}))

    cases = {"AB": case("good", "poor"), "BA": case("poor", "good")}
    [(_, votes)] = ask_all([poll.question(cases, {})], poll, ask, ignore)
    assert sorted(seen) == [(False, 0), (False, 1), (True, 0), (True, 1)]
    assert [(vote.order, vote.seed) for vote in votes] == [("AB", 0), ("AB", 1), ("BA", 0), ("BA", 1)]


def test_failures_are_votes_without_values(rubric):
    poll = Poll(SCORE, rubric, votes=4, workers=1)
    replies = [reply(4), Reply("good", False, 10, 5), Reply("goo", True, 10, 5), RequestFailed("timeout", "60 s")]

    def ask(messages, seed):
        if isinstance(replies[seed], RequestFailed):
            raise replies[seed]
        return replies[seed]

    [(_, votes)] = ask_all(questions(poll, 1), poll, ask, ignore)
    assert [vote.failure for vote in votes] == ["", "not_json", "cut_off", "timeout"]
    assert [vote.values is None for vote in votes] == [False, True, True, True]
    assert [vote.completion_tokens for vote in votes] == [5, 5, 5, None]
    assert votes[1].detail.endswith(": 'good'")


def test_a_server_that_is_gone_ends_the_run(rubric):
    """What was judged before has been given back."""
    poll = Poll(SCORE, rubric, votes=3, workers=1)
    asked = []

    def ask(messages, seed):
        asked.append(seed)
        if len(asked) > 6:
            raise RequestFailed("no_connection", "refused")
        return reply(4)

    found = []
    message = f"last {MAX_UNANSWERED} requests had no reply .no_connection: refused"
    with pytest.raises(StoppedEarly, match=message) as raised:
        found.extend(ask_all(questions(poll, 100), poll, ask, ignore))
    assert raised.value.status == 1
    assert len(found) == 2 + MAX_UNANSWERED // 3


def test_rows_that_a_server_refuses_do_not_end_the_run(rubric):
    """Such as those that are too long: else a run that goes on would stop at the same rows."""
    poll = Poll(SCORE, rubric, workers=1)

    def ask(messages, seed):
        raise RequestFailed("http_400", "too long")

    assert len(list(ask_all(questions(poll, MAX_UNANSWERED), poll, ask, ignore))) == MAX_UNANSWERED


def test_failures_between_replies_do_not_end_the_run(rubric):
    poll = Poll(SCORE, rubric, votes=1, workers=1)
    asked = []

    def ask(messages, seed):
        asked.append(seed)
        if len(asked) % MAX_UNANSWERED:
            raise RequestFailed("http_500", "")
        return reply(4)

    assert len(list(ask_all(questions(poll, 3 * MAX_UNANSWERED), poll, ask, ignore))) == 3 * MAX_UNANSWERED


def test_an_error_of_ours_is_not_a_vote(rubric):
    poll = Poll(SCORE, rubric)

    def ask(messages, seed):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(ask_all(questions(poll, 1), poll, ask, ignore))


def test_the_key_is_of_what_is_asked(rubric):
    """It follows answer, model, settings, votes and kind; not the seed: failed rows may be asked with another."""
    poll = Poll(SCORE, rubric)
    base = poll.question({"": case("a")}, {"model": "m"}).key
    assert Poll(SCORE, rubric, seed=9, workers=1).question({"": case("a")}, {"model": "m"}).key == base
    others = [
        poll.question({"": case("b")}, {"model": "m"}),
        poll.question({"": case("a")}, {"model": "n"}),
        poll.question({"": case("a")}, {"model": "m", "temperature": 0}),
        Poll(SCORE, rubric, votes=5).question({"": case("a")}, {"model": "m"}),
        Poll(COMPARE, rubric).question({"": case("a", "b")}, {"model": "m"}),
    ]
    assert len({base, *(question.key for question in others)}) == 6


@pytest.mark.parametrize("settings", [{"votes": 0}, {"workers": 0}])
def test_settings_outside_their_range(rubric, settings):
    with pytest.raises(UserError, match="--votes and --workers must be at least 1"):
        Poll(SCORE, rubric, **settings)
