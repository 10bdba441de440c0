"""The training of the initial model of MoDS on the seed set, by this project's own trainer.

In the work directory:
    seed.jsonl      the seed set as messages, whatever the formats of its files are
    initial/        the model
    initial.json    what it was trained from, and whether that is done
    train.log       the log of the training
"""

import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dft.checkpoints.manifest import write_text
from dft.errors import UserError
from dft.files import make_directory
from dft.printable import printable
from dft.program import rank_and_world_size
from dft.reading.rows import Conversation
from dft.secrets import is_secret
from dft.selection.model_flags import ModelFlags

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).parents[2]
SCRIPT = "scripts/train.sh"
OWN_FLAGS = ("--model_name_or_path", "--data_files", "--output_dir")
LAUNCHER_VARIABLES = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT".split()


@dataclass(frozen=True)
class SeedTraining:
    """How the initial model is trained.

    Args:
        base: the model that is trained.
        work: the work directory.
        flags: for scripts/train.sh; None where nothing is to be trained.
    """

    base: ModelFlags
    work: Path
    flags: list[str] | None = None

    def __post_init__(self):
        names = [word.partition("=")[0] for word in self.flags or []]
        secret = [name for name in names if name.startswith("--") and is_secret(name)]
        if secret:  # flags are noted in files
            raise UserError(f"--train_flags {printable(secret[0])}: give keys by the environment, such as HF_TOKEN")
        taken = [name for name in names if name.replace("-", "_") in _as_words(OWN_FLAGS)]
        if taken:
            raise UserError(f"--train_flags {printable(taken[0])}: mods gives {', '.join(OWN_FLAGS)} itself")
        if self.flags is not None and not (PROJECT / SCRIPT).is_file():
            raise UserError(
                f"--train_flags: {SCRIPT} isn't beside the package; use the project's own directory, or train on the "
                "seed set yourself and give --initial_model"
            )

    @property
    def seed_file(self) -> Path:
        """Where the seed set is."""
        return self.work / "seed.jsonl"

    @property
    def model(self) -> Path:
        """Where the model is."""
        return self.work / "initial"

    @property
    def log(self) -> Path:
        """Where the log of the training is."""
        return self.work / "train.log"

    def check_outside(self, rows: Sequence[Conversation]) -> None:
        """Raises UserError where rows are read from the work directory, which would be selected from themselves."""
        real = os.path.realpath(self.work)
        inside = [path for path in {row.path for row in rows} if Path(os.path.realpath(path)).is_relative_to(real)]
        if inside:
            raise UserError(
                f"--work_dir {printable(self.work)} holds {printable(min(inside))}, which --data_files name: give "
                "another directory"
            )

    def write_seeds(self, rows: Sequence[Conversation]) -> list[str]:
        """Writes the seed set; returns notes. All ranks may call it, and the first one writes.

        Raises:
            UserError: the work directory can't be made or written to.
        """
        if rank_and_world_size()[0] > 0:
            return []
        make_directory(str(self.work), "--work_dir")
        text = "".join(json.dumps(_as_row(row)) + "\n" for row in rows)
        notes = []
        if self.seed_file.is_file() and self.seed_file.read_text(encoding="utf-8") != text and self.flags is None:
            notes.append(
                f"The seed set isn't the one that {printable(self.seed_file)} held before: an initial model of that "
                "one has not seen these rows."
            )
        _write(self.seed_file, text)
        return notes

    def trained_model(self) -> ModelFlags | None:
        """The model that is trained on the seed file, now or by an earlier run; None where none is to be trained.

        Raises:
            UserError: another model is in its place, or the training fails.
        """
        if self.flags is None:
            return None
        facts = self._facts()
        found = self._found()
        if found is None and self.model.is_dir() and any(self.model.iterdir()):
            raise UserError(f"{printable(self.model)} holds what mods has not trained: give another --work_dir")
        if found is not None and found["facts"] != facts:
            raise UserError(
                f"{printable(self.model)} was trained on another seed set, from another model or with other "
                "--train_flags: give another --work_dir, or remove that directory and initial.json beside it"
            )
        if found is not None and found["is_done"] and any(self.model.glob("*config.json")):
            logger.info("%s is trained on this seed set already", printable(self.model))
        else:
            self._train(facts)
        return replace(self.base, directory=self.model)

    def how_to_go_on(self) -> str:
        """The sentence that says how to train the model by hand."""
        command = shlex.join(["bash", SCRIPT, *self._own_flags()])
        return (
            f"Now train the initial model on the seed set: {printable(command)} and start mods again with "
            f"--initial_model {printable(shlex.quote(str(self.model)))}, and with --overwrite for the same --output"
        )

    def _own_flags(self, absolute: bool = False) -> list[str]:
        paths = (self.base.directory, self.seed_file, self.model)
        shown = [str(path.absolute() if absolute else path) for path in paths]
        words = [word for pair in zip(OWN_FLAGS, shown, strict=True) for word in pair]
        return words + (["--trust_remote_code", "True"] if self.base.trust_remote_code else [])

    def _facts(self) -> dict[str, object]:
        digest = hashlib.sha256(self.seed_file.read_bytes()).hexdigest()
        return {"seed_set": digest, "model": str(self.base.directory.resolve()), "flags": self.flags}

    def _found(self) -> dict | None:
        """What an earlier run has noted; None where there is nothing that can be read."""
        try:
            found = json.loads((self.work / "initial.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and {"facts", "is_done"} <= set(found) else None

    def _train(self, facts: dict[str, object]) -> None:
        from accelerate.utils.memory import clear_device_cache

        note = self.work / "initial.json"
        _write(note, json.dumps({"facts": facts, "is_done": False}))
        clear_device_cache(garbage_collection=True)  # the reward model is gone, and the training needs its memory
        resume = ["--resume_from_checkpoint", "last"] if any(self.model.glob("checkpoint-*/manifest.json")) else []
        command = ["bash", str(PROJECT / SCRIPT), *self._own_flags(absolute=True), *resume, *self.flags]
        logger.info("Training the initial model: %s", printable(shlex.join(command)))
        status = subprocess.run(command, env=self._environment(), check=False).returncode
        if status != 0:
            raise UserError(
                f"the training of the initial model ended with status {status}: {printable(self.log)} says why. The "
                "same command starts it again"
            )
        _write(note, json.dumps({"facts": facts, "is_done": True}))

    def _environment(self) -> dict[str, str]:
        """That of this process, without what a launcher of one process has put there."""
        kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        kept = {name: value for name, value in kept.items() if not name.startswith(("TORCHELASTIC_", "ACCELERATE_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return kept | {"PATH": path, "LOG_FILE": str(self.log.absolute()), "BACKGROUND": "0"}


def _as_words(flags: Sequence[str]) -> set[str]:
    return {flag.replace("-", "_") for flag in flags}


def _as_row(row: Conversation) -> dict[str, object]:
    """A row in the format of messages, without what it doesn't have."""
    values = {
        "messages": row.messages,
        "tools": row.tools,
        "chat_template_kwargs": row.template_kwargs,
        "channel": row.channel,
    }
    return {name: value for name, value in values.items() if value}


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{printable(path)} can't be written: {error.strerror}") from error
