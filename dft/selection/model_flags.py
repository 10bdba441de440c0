"""The flags of the commands that ask a model. Imports neither torch nor transformers."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dft.errors import UserError
from dft.files import path_argument
from dft.printable import printable

if TYPE_CHECKING:
    from dft.selection.scoring_model import ScoringModel

DTYPES = ("auto", "float32", "bfloat16", "float16")  # as dft.model.trained has them, which imports torch


@dataclass(frozen=True)
class ModelFlags:
    """Which model is asked, and how.

    Args:
        directory: of the model.
        tokens_at_once: of a batch, with padding.
        cache_dir: for scores, see dft.selection.model_rows.shard_directory; None for the default.
    """

    directory: Path
    device: str = "auto"
    dtype: str = "auto"
    tokens_at_once: int = 8192
    cache_dir: Path | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.tokens_at_once < 1:
            raise UserError(f"--tokens_at_once {self.tokens_at_once} must be at least 1")

    @classmethod
    def of(cls, args: argparse.Namespace, directory: Path, flag: str) -> "ModelFlags":
        """The flags of a command line.

        Raises:
            UserError: there is no such directory.
        """
        if not directory.is_dir():
            raise UserError(f"{flag} {printable(directory)} is not a directory: give one that holds a model")
        return cls(directory, args.device, args.dtype, args.tokens_at_once, args.cache_dir, args.trust_remote_code)

    def load(self) -> "ScoringModel":
        """The causal language model of the directory. All ranks must call it together."""
        from dft.selection.scoring_model import load_scoring_model

        return load_scoring_model(self.directory, self.device, self.dtype, self.trust_remote_code)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """All of ModelFlags but the directory."""
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="by default GPUs, if there are any")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="by default what the model is saved in")
    parser.add_argument("--tokens_at_once", type=int, default=8192, help="tokens of a batch on each device")
    parser.add_argument("--cache_dir", type=path_argument, help="for scores, with which a run that was cut goes on")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def check_max_length(max_length: int | None) -> None:
    """Raises UserError where no token would be left."""
    if max_length is not None and max_length < 1:
        raise UserError(f"--max_length is {max_length}; it must be at least 1 token")
