"""Heartbeats beside the collectives: a rank that was killed, hangs or is cut off is named within a minute.

A collective says nothing while it waits, and fails only after --ddp_timeout. So a thread of each rank writes, every
few seconds, into the store in which the ranks met: a count, and how far its training has come. The first rank of each
node reads those of all ranks, and logs an error that names the ones which the others wait for; the second does so for
the first. It ends nothing: that is left to the collectives. One that fails because a peer has gone says only that a
connection was closed; the beats tell which rank it was.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainerCallback

from dft.errors import RankLost
from dft.launched import local_rank

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0
SILENT_SECONDS = 45.0  # without a beat, or all ranks without progress
OTHERS_WAIT_SECONDS = 30.0  # ranks of a node for their first one, which ends the run with a message


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        count: of its beats.
        place: how far it has come: n steps, and a half within the next one. None where ranks differ in what they do,
            as one may save while the others go on.
        name: of the process, for people.
    """

    count: int
    place: float | None
    name: str

    def to_bytes(self) -> bytes:
        return f"{self.count} {self.place} {self.name}".encode()

    @classmethod
    def from_bytes(cls, value: bytes) -> "Beat":
        count, place, name = value.decode().split(" ", 2)
        return cls(int(count), None if place == "None" else float(place), name)


class Watch:
    """Finds the ranks that the others wait for.

    Args:
        num_ranks: of the training.
        now: seconds, of a clock that doesn't go back; so are all later times.
        only: the one rank that is named; None for all.
    """

    def __init__(self, num_ranks: int, now: float, only: int | None = None):
        self.only = only
        self._is_closed = False
        self._beats: dict[int, Beat] = {}
        self._heard = dict.fromkeys(range(num_ranks), now)  # when each rank was last heard of
        self._progress = now  # when a rank last came further
        self._looked = self._answered = now
        self._said: set[tuple[str, int]] = set()

    def close(self) -> None:
        """Takes in that the connection to the store, which rank 0 holds, was closed from there."""
        self._is_closed = True

    def hear(self, beats: Mapping[int, Beat], now: float) -> None:
        """Takes in the beats of all ranks that have written one."""
        self._answered = now
        for rank, beat in beats.items():
            before = self._beats.get(rank)
            if before is None or beat.count != before.count:
                self._heard[rank] = now
            if before is None or beat.place is None or beat.place != before.place:
                self._progress = now
            self._beats[rank] = beat

    def complaints(self, now: float) -> list[str]:
        """What is wrong and hasn't been said yet; what was said is said again if it ends and comes back."""
        if now - self._looked > 2 * INTERVAL_SECONDS:  # this process was stopped itself, perhaps with all others
            self._heard = dict.fromkeys(self._heard, now)
            self._progress = self._answered = now
        self._looked = now
        found = {key: text for key, text in self._find(now).items() if self.only in (None, key[1])}
        new = [text for key, text in found.items() if key not in self._said]
        self._said = set(found)
        return new

    def gone_since(self, then: float) -> list[str]:
        """Names of the ranks without a beat after a time; only rank 0, where the store was, if nothing can be read."""
        is_first_gone = self._is_closed or self._answered < then
        gone = [0] if is_first_gone else [rank for rank, heard in self._heard.items() if heard < then]
        return [self._name(rank) for rank in gone if self.only in (None, rank)]

    def _find(self, now: float) -> dict[tuple[str, int], str]:
        """What is wrong now: {what it is, and of which rank: the sentence}."""
        first = self._name(0)
        if self._is_closed:
            reason = "The reason is in the output of that process; if there is none, it was killed"
            return {("closed", 0): f"{first} has ended, or its node is cut off. {reason}, perhaps for want of memory"}
        if now - self._answered > SILENT_SECONDS:
            seconds = now - self._answered
            return {("store", 0): f"{first} has not answered for {seconds:.0f} s: it hangs, or its node is cut off"}
        silent = [rank for rank, heard in self._heard.items() if now - heard > SILENT_SECONDS]
        if silent:
            return {
                ("silent", rank): f"{self._name(rank)} has not been heard of for {now - self._heard[rank]:.0f} s: "
                "it was killed or stopped, or its node is cut off"
                for rank in silent
            }
        places = {rank: beat.place for rank, beat in dict(self._beats).items()}  # another thread may add one
        if now - self._progress <= SILENT_SECONDS or len(places) < len(self._heard) or None in places.values():
            return {}
        first, last = max(places.values()), min(places.values())
        if first == last:
            return {}
        return {
            ("behind", rank): f"{self._name(rank)} is behind in step {int(last) + 1}, and the others have waited for "
            f"{now - self._progress:.0f} s: it hangs outside of a collective, as in reading data"
            for rank, place in places.items()
            if place == last
        }

    def _name(self, rank: int) -> str:
        beat = self._beats.get(rank)
        return f"rank {rank}" + (f" ({beat.name})" if beat else "")


class Heartbeat(TrainerCallback):
    """Writes and watches the heartbeats of a training on several ranks; on one it does nothing."""

    def __init__(self):
        self._place: float | None = None
        self._is_over = threading.Event()
        self._watch: Watch | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the threads: one that beats and, on the first two ranks of a node, one that tells."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        self._place = float(state.global_step)
        self._is_over = threading.Event()
        watch = self._watch = None
        if local_rank() <= 1:
            only = dist.get_rank() - 1 if local_rank() == 1 else None
            watch = self._watch = Watch(dist.get_world_size(), time.monotonic(), only)
        store = dist.PrefixStore("heartbeat", _get_default_store().clone())  # a connection of its own
        threading.Thread(target=self._beat, args=(store, dist.get_rank(), watch, self._is_over), daemon=True).start()
        if watch is not None:  # in another thread, because the store may never answer
            threading.Thread(target=_tell, args=(watch, self._is_over), daemon=True).start()

    def on_step_begin(self, args, state, control, **kwargs):
        """Notes that this rank has its data, and is within a step."""
        self._place = state.global_step + 0.5

    def on_step_end(self, args, state, control, **kwargs):
        """Notes that a step is over; what follows may differ between ranks."""
        differ = control.should_save or control.should_evaluate or control.should_training_stop
        self._place = None if differ else float(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        """Ends the threads."""
        self._is_over.set()

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Around a training: a collective that fails because a rank has gone raises the name of that rank.

        Raises:
            RankLost: in place of such an error, on the first rank of each node, or on the second if it is the first
                that has gone; the others wait for the launcher to end them with it.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_of_connection(error):
                raise
            failed = time.monotonic()
            time.sleep(4 * INTERVAL_SECONDS)  # all that live beat in it, and are read
            # a last beat may be read one interval late
            lost = [] if self._watch is None else self._watch.gone_since(failed + 1.5 * INTERVAL_SECONDS)
            if not lost:
                if self._watch is None or self._watch.only is not None:
                    time.sleep(OTHERS_WAIT_SECONDS)
                raise
            raise RankLost(
                f"{', '.join(lost)}: not heard of any more, so this training can't go on. The reason is in the output "
                "of that process; if there is none, it was killed, perhaps for want of memory, or its node is down or "
                "cut off. Go on from the newest checkpoint with --resume_from_checkpoint last"
            ) from error

    def _beat(self, store: dist.Store, rank: int, watch: Watch | None, is_over: threading.Event) -> None:
        name = f"{socket.gethostname()}, process {os.getpid()}"
        count = 0
        known: set[int] = set()  # ranks that have written
        while not is_over.wait(INTERVAL_SECONDS if count else 0.0):
            count += 1
            try:
                store.set(str(rank), Beat(count, self._place, name).to_bytes())
                if watch is not None:
                    unknown = set(range(dist.get_world_size())) - known
                    known |= {other for other in unknown if store.check([str(other)])}
                    values = store.multi_get([str(other) for other in sorted(known)])
                    beats = map(Beat.from_bytes, values)
                    watch.hear(dict(zip(sorted(known), beats, strict=True)), time.monotonic())
            except dist.DistNetworkError:  # rank 0 has ended: to write again would print a trace from C++ each time
                if watch is not None:
                    watch.close()
                return
            except RuntimeError:  # no answer: that nothing was heard is told by the watch
                continue


def is_of_connection(error: RuntimeError) -> bool:
    """Whether an error is torch.distributed's: gloo has no class of its own for them."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _tell(watch: Watch, is_over: threading.Event) -> None:
    while not is_over.wait(INTERVAL_SECONDS):
        for complaint in watch.complaints(time.monotonic()):
            logger.error(complaint)
