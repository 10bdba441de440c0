"""Checkpoints whose files were changed, that belong to another run, or that have code hidden in them.

The parts damaged, foreign, flipped and code of benchmarks/faults.py. What a run says of such a checkpoint is asked of
the program itself, started on it by name.
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.faulty_runs import SAVE_STEPS, STEPS, Run
from dft.checkpoints.integrity import check_whole
from dft.checkpoints.manifest import MANIFEST, describe, list_files, read_manifests, write_manifest
from dft.checkpoints.resume import find_newest
from dft.errors import UserError
from examples.make_tiny_model import make_model

USER_ERROR_STATUS = 2
BEFORE = STEPS - SAVE_STEPS  # the step of the checkpoint before the last one
CHANGED_STEP = f"global_step{STEPS}"  # DeepSpeed's folder

Line = tuple[str, str, bool]  # what was done, what came of it, whether that was asked for


# ---- changed files ------------------------------------------------------------------------------


def cut(path: Path) -> None:
    """Leaves the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, place: float = 0.5, bit: int = 0) -> None:
    """Flips one bit.

    Args:
        place: of its byte, from 0 to below 1.
    """
    with open(path, "r+b") as file:
        offset = int(place * path.stat().st_size)
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def empty(path: Path) -> None:
    """Leaves nothing in a file."""
    os.truncate(path, 0)


def edit(path: Path, old: str, new: str) -> None:
    """Replaces a text in a file, which must be there."""
    text = path.read_text(encoding="utf-8")
    if old not in text:
        raise ValueError(f"{old!r} is not in {path}")
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def swap(path: Path, other: Path) -> None:
    """Exchanges the contents of two files of one kind."""
    kept = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def of_earlier(path: Path) -> None:
    """Puts in its place the file of the checkpoint before, as an incomplete copy would."""
    name = path.relative_to(path.parents[1]).as_posix().replace(CHANGED_STEP, f"global_step{BEFORE}")
    shutil.copy(path.parents[2] / f"checkpoint-{BEFORE}" / name, path)


def damages(checkpoint: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """What can be done to a checkpoint of ZeRO-3 on two processes, by name: to which file, and what."""
    parts, latest = checkpoint / CHANGED_STEP, checkpoint / "latest"
    states, optimizer = sorted(parts.glob("*model_states.pt")), sorted(parts.glob("*optim_states.pt"))
    model, trainer = checkpoint / "model.safetensors", checkpoint / "trainer_state.json"
    random_states, manifest = sorted(checkpoint.glob("rng_state*.pth")), checkpoint / MANIFEST
    return {
        "the model cut": (model, cut),
        "the model flipped": (model, flip),
        "the model empty": (model, empty),
        "the model missing": (model, Path.unlink),
        "the optimizer of a rank cut": (optimizer[0], cut),
        "the optimizer of a rank flipped": (optimizer[1], flip),
        "the optimizer of a rank empty": (optimizer[1], empty),
        "the optimizer of a rank missing": (optimizer[1], Path.unlink),
        "the optimizers of two ranks exchanged": (optimizer[0], partial(swap, other=optimizer[1])),
        "the optimizer of a rank from the checkpoint before": (optimizer[0], of_earlier),
        "the states of a rank cut": (states[1], cut),
        "the states of a rank flipped": (states[0], flip),
        "the states of a rank missing": (states[0], Path.unlink),
        "DeepSpeed's folder missing": (parts, shutil.rmtree),
        "DeepSpeed's latest missing": (latest, Path.unlink),
        "DeepSpeed's latest names another folder": (latest, partial(Path.write_text, data="global_step1")),
        "a random state flipped": (random_states[0], flip),
        "a random state missing": (random_states[1], Path.unlink),
        "the random states exchanged": (random_states[0], partial(swap, other=random_states[1])),
        "the trainer's state cut": (trainer, cut),
        "the trainer's state with another step": (trainer, partial(edit, old=f": {STEPS},", new=": 11,")),
        "the trainer's state missing": (trainer, Path.unlink),
        "the schedule flipped": (checkpoint / "scheduler.pt", flip),
        "the configuration missing": (checkpoint / "config.json", Path.unlink),
        "the tokenizer edited": (checkpoint / "tokenizer.json", partial(edit, old='"1.0"', new='"1.1"')),
        "the manifest cut": (manifest, cut),
        "the manifest edited": (manifest, partial(edit, old='"step": ', new='"step": 1')),
    }


def damaged(run: Run, tries: int) -> list[Line]:
    """The newest checkpoint is damaged: named, it is refused; `last` is the one before."""
    lines = []
    newest = run.out / f"checkpoint-{STEPS}"
    for name in list(damages(newest))[:tries]:
        one = _copy(run, f"damaged: {name}")
        path = one.out / newest.name
        file, damage = damages(path)[name]
        damage(file)
        last = find_newest(one.out).name
        outcome, is_right = _refused(one, f"{path.name}/{file.relative_to(path)}", resume_from_checkpoint=path)
        lines.append((name, f"{outcome}; last: {last}", is_right and last == f"checkpoint-{BEFORE}"))
        shutil.rmtree(one.place)
    return lines


def _copy(run: Run, name: str) -> Run:
    """A copy of a run with its checkpoints."""
    one = replace(run, place=run.place.parent / "".join(c if c.isalnum() else "-" for c in name))
    shutil.copytree(run.out, one.out)
    return one


def _refused(run: Run, word: str, **settings: Any) -> tuple[str, bool]:
    """Starts a run that should end with a message that holds a word; what came of it, and whether it was that.

    The outcome is the first line of the message that holds the word, without the directory of this run.
    """
    status = run.finish(**settings)
    output = run.output()
    _, _, message = output.partition("error: ")
    said = [line for line in message.splitlines() if word in line]
    told = said[0].replace(f"{run.out}/", "").strip()[:120] if said else "nothing of it"
    has_trace = 'train_dft.py", line' in output  # torchrun prints a trace of its own for any status
    return f"status {status}, {told}", status == USER_ERROR_STATUS and bool(said) and not has_trace


def flipped(run: Run, tries: int) -> list[Line]:
    """One bit of a checkpoint is flipped, anywhere, a bit more likely in small files."""
    choose, missed = random.Random(2), []
    checkpoint = run.out / f"checkpoint-{STEPS}"
    names = list(list_files(checkpoint))
    for i in range(tries):
        path = checkpoint / names[i % len(names)]
        place, bit = choose.random(), choose.randrange(8)
        flip(path, place, bit)
        try:
            check_whole(checkpoint)
            missed.append(f"{path.name} at {place:.3f}")
        except UserError as error:
            if path.name not in str(error):
                missed.append(f"{path.name}: {error}")
        flip(path, place, bit)
    check_whole(checkpoint)  # all bits are back
    done = f"{tries} bits in {len(names)} files, one at a time"
    return [(done, f"{tries - len(missed)} found{''.join(map('; '.__add__, missed))}", not missed)]


# ---- of another run -------------------------------------------------------------------------------


def foreign(run: Run, tries: int) -> list[Line]:
    """A checkpoint is given to a run with other data or settings, and it says which."""
    data = run.place.parent / "other.jsonl"
    data.write_text("".join((run.place.parent / "data.jsonl").read_text().splitlines(keepends=True)[::-1]))
    model = run.place.parent / "other-model"
    shutil.copytree(run.place.parent / "model", model, dirs_exist_ok=True)
    make_model(600, hidden_size=64, num_layers=2).save_pretrained(model)
    facts = {  # of the manifest, by what is changed
        "another alpha": ("dft_alpha", {"dft_alpha": 0.7}),
        "another objective": ("objective", {"objective": "eaft"}),
        "other rows": ("content_of_rows", {"data_files": data}),
        "fewer rows": ("training_rows", {"data_files": f"{run.place.parent / 'data.jsonl'}#30"}),
        "other batches": ("rows_per_step", {"gradient_accumulation_steps": 2}),
        "padded batches": ("batching", {"batching": "padded"}),
        "another length": ("max_length", {"max_length": 96}),
        "another order": ("data_seed", {"data_seed": 1}),
        "another learning rate": ("learning_rate", {"learning_rate": 1e-3}),
        "another schedule": ("lr_scheduler_type", {"lr_scheduler_type": "cosine"}),
        "another optimizer": ("adam_beta2", {"adam_beta2": 0.9}),
        "another model": ("hidden_size", {"model_name_or_path": model}),
    }
    others = {
        "a checkpoint beyond the end": ("beyond --max_steps", {"max_steps": SAVE_STEPS}),
        "a directory that isn't there": ("nowhere", {"resume_from_checkpoint": run.out / "nowhere"}),
        "a directory that is no checkpoint": ("not a whole checkpoint", {"resume_from_checkpoint": data.parent}),
    }
    engines: dict[str, tuple[str, dict[str, Any]]] = {
        "another stage of ZeRO": ("zero_stage", {"config": "ds_config/zero2.json"}),
        "without DeepSpeed": ("engine", {"launcher": "torchrun"}),
        "another number of processes": ("world_size", {"processes": 1}),
    }
    cases = [(name, f"{fact}: checkpoint", settings, {}) for name, (fact, settings) in facts.items()]
    cases += [(name, words, settings, {}) for name, (words, settings) in others.items()]
    cases += [(name, f"{fact}: checkpoint", {}, changes) for name, (fact, changes) in engines.items()]
    checkpoint = {"resume_from_checkpoint": run.out / f"checkpoint-{BEFORE}"}
    lines = []
    for number, (name, words, settings, changes) in enumerate(cases[:tries]):
        one = replace(run, place=run.place.parent / f"foreign-{number}", **changes)
        lines.append((name, *_refused(one, words, **(checkpoint | settings))))
    return lines


# ---- with code ------------------------------------------------------------------------------------


class Code:
    """Its pickle makes a directory when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def with_code(run: Run, tries: int) -> list[Line]:
    """Code is hidden in each file that is loaded as a pickle, in a checkpoint whose manifest is right again."""
    lines = []
    alone = Run(run.place.parent / "alone", "python")
    if alone.finish():
        return [("a run without DeepSpeed", "it failed", False)]
    of_runs = [(one, name) for one in (run, alone) for name in _pickles(one.out / f"checkpoint-{STEPS}")]
    for number, (whole, name) in enumerate(of_runs[:tries]):
        one = _copy(whole, f"code-{number}")
        checkpoint, mark = one.out / f"checkpoint-{STEPS}", one.place / "ran"
        torch.save({"weight": torch.zeros(2), "more": [Code(mark)]}, checkpoint / name)
        manifest = read_manifests(checkpoint)[MANIFEST]
        manifest["files"][name] = describe(checkpoint / name)
        del manifest["version"]
        write_manifest(checkpoint / MANIFEST, manifest)
        outcome, is_right = _refused(one, name, resume_from_checkpoint=checkpoint)
        ran = mark.exists()
        lines.append(
            (
                f"{whole.launcher}: {name}",
                f"{outcome}; {'the code ran' if ran else 'nothing ran'}",
                is_right and not ran,
            )
        )
        shutil.rmtree(one.place)
    return lines


def _pickles(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that torch has saved."""
    return [name for name in list_files(checkpoint) if name.endswith((".pt", ".pth", ".bin"))]
