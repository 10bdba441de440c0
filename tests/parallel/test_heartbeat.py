"""Heartbeats: who is named, when, and how often. Time is what the tests say it is."""

import threading

import pytest
import torch.distributed as dist
from transformers import TrainerControl, TrainerState

from dft.errors import RankLost
from dft.parallel import heartbeat
from dft.parallel.heartbeat import INTERVAL_SECONDS, SILENT_SECONDS, Beat, Heartbeat, Watch

LONG = int(2 * SILENT_SECONDS / INTERVAL_SECONDS)  # looks, after which everything has been said


def told(places, *, num_looks=LONG, silent=(), answers=True) -> list[str]:
    """What a watch says while it looks at ranks, whose places don't change and some of which have stopped beating."""
    watch = Watch(len(places), now=0.0)
    complaints = []
    for look in range(num_looks):
        now = INTERVAL_SECONDS * (look + 1)
        beats = {
            rank: Beat(0 if rank in silent else look, place, f"host{rank}, process 7")
            for rank, place in enumerate(places)
        }
        if answers or look == 0:
            watch.hear(beats, now)
        complaints += watch.complaints(now)
    return complaints


def test_ranks_that_beat_and_wait_at_one_place_are_not_named():
    assert told([4.5, 4.5, 4.5]) == []


def test_a_rank_that_is_killed_or_stopped_is_named_once():
    (complaint,) = told([4.5, 4.5, 4.5], silent=[1])
    assert complaint.startswith("rank 1 (host1, process 7) has not been heard of for 50 s")


def test_a_rank_that_hangs_between_two_steps_is_named():
    (complaint,) = told([4.5, 4.0, 4.5])
    assert complaint.startswith("rank 1 (host1, process 7) is behind in step 5, and the others have waited for 50 s")


def test_nobody_is_behind_while_one_saves():
    assert told([None, 4.5, 4.5]) == []


def test_all_are_named_in_less_than_a_minute():
    num_looks = int(60 / INTERVAL_SECONDS) - 1
    assert len(told([4.5, 4.5], silent=[0], num_looks=num_looks)) == 1
    assert len(told([4.5, 4.0], num_looks=num_looks)) == 1
    assert len(told([4.5, 4.5], answers=False, num_looks=num_looks)) == 1


def test_a_rank_that_never_came_is_named():
    watch = Watch(2, now=0.0)
    for look in range(LONG):
        now = INTERVAL_SECONDS * (look + 1)
        watch.hear({0: Beat(look, 0.5, "a")}, now)
        found = watch.complaints(now)
        if found:
            break
    assert found[0].startswith("rank 1 has not been heard of")


def test_a_store_that_does_not_answer_is_the_first_ranks():
    (complaint,) = told([4.5, 4.5], answers=False)
    assert complaint.startswith("rank 0 (host0, process 7) has not answered for 50 s")


@pytest.mark.parametrize(
    ("only", "silent", "names"), [(0, (0, 1), ["rank 0"]), (1, (2,), []), (None, (2,), ["rank 2"])]
)
def test_the_second_rank_of_a_node_names_the_first_alone(only, silent, names):
    watch = Watch(3, now=0.0, only=only)
    found = []
    for look in range(LONG):
        now = INTERVAL_SECONDS * (look + 1)
        watch.hear({rank: Beat(0 if rank in silent else look, 4.5, "a") for rank in range(3)}, now)
        found += watch.complaints(now)
    assert [text.split(" (")[0] for text in found] == names
    assert [name.split(" (")[0] for name in watch.gone_since(2 * INTERVAL_SECONDS)] == names


def test_a_store_that_was_closed_is_told_at_once():
    watch = Watch(2, now=0.0, only=0)
    watch.hear({rank: Beat(1, 4.5, f"host{rank}, process 7") for rank in (0, 1)}, 5.0)
    assert watch.complaints(5.0) == []
    watch.close()
    (complaint,) = watch.complaints(10.0)
    assert complaint.startswith("rank 0 (host0, process 7) has ended")
    assert watch.complaints(15.0) == []
    assert watch.gone_since(0.0) == ["rank 0 (host0, process 7)"]


def test_a_watch_that_was_stopped_itself_names_nobody():
    """As where SLURM suspends a job."""
    watch = Watch(2, now=0.0)
    watch.hear({rank: Beat(1, 0.5, "a") for rank in range(2)}, 5.0)
    assert watch.complaints(5.0) == []
    assert watch.complaints(5000.0) == []


def test_what_ends_and_comes_back_is_said_again():
    watch = Watch(1, now=0.0)
    said, count, now = [], 0, 0.0
    for is_beating in [True, *[False] * LONG, True, *[False] * LONG]:
        now += INTERVAL_SECONDS
        count += is_beating
        watch.hear({0: Beat(count, None, "a")}, now)
        said += watch.complaints(now)
    assert len(said) == 2


@pytest.mark.parametrize("beat", [Beat(3, None, "a host, process 1"), Beat(10**6, 2.5, "b, process 2")])
def test_a_beat_is_read_as_it_was_written(beat):
    assert Beat.from_bytes(beat.to_bytes()) == beat


def test_the_place_follows_the_training():
    pulse, state, control = Heartbeat(), TrainerState(global_step=3), TrainerControl()
    pulse.on_step_begin(None, state, control)
    assert pulse._place == 3.5
    state.global_step = 4
    pulse.on_step_end(None, state, control)
    assert pulse._place == 4.0
    pulse.on_step_end(None, state, TrainerControl(should_save=True))
    assert pulse._place is None


class TwoBeats(threading.Event):
    """Over after two beats."""

    def __init__(self):
        super().__init__()
        self.num_waits = 0

    def wait(self, timeout=None):
        self.num_waits += 1
        return self.num_waits > 2


def test_each_rank_writes_and_the_watch_reads(monkeypatch):
    monkeypatch.setattr(heartbeat.dist, "get_world_size", lambda: 3)
    store, watch = dist.HashStore(), Watch(3, now=0.0)
    for rank in (1, 0):  # rank 2 hasn't come yet
        Heartbeat()._beat(store, rank, watch if rank == 0 else None, TwoBeats())
    assert {rank: beat.count for rank, beat in watch._beats.items()} == {0: 2, 1: 2}


class ClosedStore:
    """A store whose process has ended."""

    def set(self, *_):
        raise dist.DistNetworkError("Broken pipe")


def test_the_beat_ends_with_the_store(monkeypatch):
    watch, over = Watch(2, now=0.0, only=0), TwoBeats()
    Heartbeat()._beat(ClosedStore(), 1, watch, over)
    assert over.num_waits == 1
    assert watch.complaints(5.0)[0].startswith("rank 0 has ended")


# ---- a collective that fails --------------------------------------------------------------------


def failing_at_10(beating, *, answers=True) -> Heartbeat:
    """Of a first rank whose collective has failed at 10 s, where only some of two ranks have beaten since."""
    callback = Heartbeat()
    callback._watch = Watch(2, now=0.0)
    for now in (9.0, 30.0) if answers else (9.0,):
        known = beating if now > 10 else (0, 1)
        beats = {rank: Beat(int(now) if rank in known else 9, 4.5, f"host{rank}, process 7") for rank in (0, 1)}
        callback._watch.hear(beats, now)
    return callback


@pytest.fixture
def clock(monkeypatch):
    """Sleeping takes no time, and it is 10 s."""
    monkeypatch.setattr(heartbeat.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: 10.0)


@pytest.mark.parametrize(
    ("callback", "name"),
    [
        (failing_at_10(beating=[0]), "rank 1 (host1, process 7)"),
        (failing_at_10(beating=[0, 1], answers=False), "rank 0 (host0, process 7)"),
    ],
)
def test_a_broken_connection_raises_the_name_of_the_lost_rank(clock, callback, name):
    with pytest.raises(RankLost, match="not heard of any more") as caught, callback.naming_lost_ranks():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("beating", "error"), [([0], ValueError("gloo")), ([0], RuntimeError("shapes")), ([0, 1], RuntimeError("gloo"))]
)
def test_other_errors_and_those_without_a_lost_rank_pass(clock, beating, error):
    with pytest.raises(type(error)) as caught, failing_at_10(beating).naming_lost_ranks():
        raise error
    assert caught.value is error
