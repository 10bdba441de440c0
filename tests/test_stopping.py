"""Runs that are ended on request: with a checkpoint, a status of their own, and by all ranks."""

import signal
import time

import pytest
import torch
from transformers import TrainerCallback

from dft.errors import StoppedEarly
from dft.loss.finite_check import FiniteCheck
from dft.stopping import StopRequest, is_launcher
from dft_trainer import DFTTrainer


@pytest.fixture
def handlers(monkeypatch) -> dict[int, object]:
    """What would be installed for signals, by their numbers; nothing is."""
    installed: dict[int, object] = {}
    monkeypatch.setattr("dft.stopping.signal.signal", installed.__setitem__)
    return installed


class CallAtStep(TrainerCallback):
    def __init__(self, step, call):
        self.step, self.call = step, call

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


@pytest.fixture
def trained(make_trainer):
    """Trains, with a call within the third step, and returns the trainer."""

    def train(call_at_step_2, max_steps=5) -> DFTTrainer:
        trainer = make_trainer(max_steps=max_steps, per_device_train_batch_size=2)
        trainer.add_callback(CallAtStep(2, lambda: call_at_step_2(trainer)))
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_training_with_a_checkpoint(trained, tmp_path, handlers, number, status):
    def send(trainer):
        trainer.stop.listen()
        handlers[number](number, None)

    trainer = trained(send)
    assert trainer.state.global_step == 3
    assert (tmp_path / "checkpoint-3" / "optimizer.pt").exists()
    said = r"after step 3 of 5\. The checkpoint is .*checkpoint-3; go on with"
    with pytest.raises(StoppedEarly, match=said) as stopped:
        trainer.stop.raise_if_stopped(trainer.state, str(tmp_path))
    assert stopped.value.status == status


def test_a_training_that_was_at_its_end_has_not_stopped_early(trained, tmp_path, handlers):
    def send(trainer):
        trainer.stop.listen()
        handlers[signal.SIGTERM](signal.SIGTERM, None)

    trainer = trained(send, max_steps=3)
    trainer.stop.raise_if_stopped(trainer.state, str(tmp_path))


def test_without_a_request_nothing_ends(trained, tmp_path, handlers):
    trainer = trained(lambda trainer: trainer.stop.listen(max_minutes=1000))
    assert trainer.state.global_step == 5
    assert not list(tmp_path.glob("checkpoint-*"))
    trainer.stop.raise_if_stopped(trainer.state, str(tmp_path))


def test_a_time_limit_is_a_request(trained, tmp_path, handlers):
    trainer = trained(lambda trainer: trainer.stop.listen(max_minutes=1e-6))
    assert trainer.state.global_step == 3
    with pytest.raises(StoppedEarly):
        trainer.stop.raise_if_stopped(trainer.state, str(tmp_path))


def test_what_a_launcher_repeats_at_once_is_one_request_and_a_second_ctrl_c_ends(monkeypatch, handlers):
    sent = []
    monkeypatch.setattr("dft.stopping.os.kill", lambda pid, number: sent.append(number))
    stop = StopRequest()
    stop.listen()
    press = handlers[signal.SIGINT]
    press(signal.SIGINT, None)
    press(signal.SIGINT, None)
    assert sent == []
    later = time.monotonic() + 5
    monkeypatch.setattr("dft.stopping.time.monotonic", lambda: later)
    press(signal.SIGINT, None)
    assert sent == [signal.SIGINT]
    assert handlers[signal.SIGINT] == signal.SIG_DFL


def test_a_request_is_agreed_on_with_the_last_micro_batch(handlers):
    stop = StopRequest()
    check = FiniteCheck(None, stop=stop)
    stop.listen(max_minutes=1e-6)
    check.begin(2)
    check.note(torch.tensor(1.0), {}, 1)
    assert stop.agreed == 0
    check.note(torch.tensor(1.0), {}, 1)
    assert stop.agreed == 143


class Process:
    def __init__(self, *words):
        self.cmdline = lambda: list(words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/python3.11", "/usr/bin/torchrun", "--nnodes", "1"], True),
        (["python", "-m", "torch.distributed.run", "x.py"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["python3", "/usr/bin/accelerate", "launch"], True),
        (["python", "notebook.py"], False),
        (["bash", "scripts/train.sh", "--deepspeed", "ds_config/zero3.json"], False),
        ([], False),
    ],
)
def test_launchers_are_known_by_their_command(words, expected):
    assert is_launcher(Process(*words)) == expected
