"""The column reference_log_p: found in a file or computed, before a training or an evaluation needs it."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedModel

from dft.errors import UserError
from dft.reference.rows import ReferenceRows, rows_to_fill
from dft.reference.scoring import Score, plan_scoring, row_lengths, score_batch, score_rows
from dft.reference.store import CACHE_DIRECTORY, RUN_DIRECTORY, Values, file_name, load, remove, save

logger = logging.getLogger(__name__)

# nats by which log-probabilities of the same weights may differ on average, computed on other devices or in other
# batches; those of other weights that are nearer than this serve as well
SAME_WEIGHTS = {"16 bits": 2e-2, "32 bits": 1e-4}


class ReferenceColumn:
    """Fills in the column of datasets, from files or by a model.

    Args:
        output_dir: of the run, in which the files are kept for when it is resumed.
        cache_dir: where other runs find them; by default one beside datasets' cache.
        is_16_bit: whether the model computes in 16 bits.
    """

    def __init__(self, output_dir: str, cache_dir: str | None, is_16_bit: bool):
        run = Path(output_dir) / RUN_DIRECTORY
        self._directories = (run, Path(cache_dir) if cache_dir else CACHE_DIRECTORY)
        self._tolerance = SAME_WEIGHTS["16 bits" if is_16_bit else "32 bits"]

    def compute(self, sets: dict[str, Any], model: PreTrainedModel, score: Score, rows_at_once: int) -> None:
        """Fills in the column of all rows that lack it, by the weights as they are. All ranks must call it together.

        A file is taken if its values are those of these weights, which is tried on one batch.

        Args:
            sets: datasets, or dictionaries of them, by what they are called.
            model: not wrapped.
            score: calls the model, see scoring.Score.
            rows_at_once: of the longest; of short ones more are scored at once.
        """
        for what, rows in _unfilled(sets).items():
            lengths = row_lengths(rows.rows)
            batches = plan_scoring(lengths, rows_at_once * int(lengths.max(initial=0)))
            name, values = self._found(rows, model, self._directories)
            if values is not None and batches and not self._agrees(rows, values, batches[0], score):
                logger.warning("%s: the log-probabilities in %s are of other weights; computed again", what, name)
                values = None
                self._forget(name)
            if values is None:
                logger.info("%s: log-probabilities by the starting weights, %d tokens", what, int(lengths.sum()))
                values = score_rows(rows.rows, batches, score)
            else:
                logger.info("%s: log-probabilities by the starting weights from %s", what, name)
            self._keep(name, values)
            rows.fill(*values)

    def find(self, sets: dict[str, Any], model: PreTrainedModel, checkpoint: Path) -> None:
        """Fills in the column from files, for a training that is resumed. All ranks must call it together.

        Args:
            checkpoint: whose run has kept them beside it, perhaps in another output directory.
        """
        for rows in _unfilled(sets).values():
            name, values = self._found(rows, model, self._searched(checkpoint))
            if values is not None:
                self._keep(name, values)
                rows.fill(*values)

    def _searched(self, checkpoint: Path) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((checkpoint.parent / RUN_DIRECTORY, *self._directories)))

    def check_found(self, sets: dict[str, Any], checkpoint: Path) -> None:
        """For a training that is resumed, whose starting weights can't be asked any more.

        Raises:
            UserError: rows lack the column.
        """
        if missing := _unfilled(sets):
            searched = ", ".join(map(str, self._searched(checkpoint)))
            raise UserError(
                f"log-probabilities by the starting weights are missing: those of the {' and the '.join(missing)} are "
                f"in none of {searched}. The weights that are resumed can't give them. Bring the files back, or begin "
                "a new run with --model_name_or_path CHECKPOINT"
            )

    def _found(
        self, rows: ReferenceRows, model: PreTrainedModel, directories: tuple[Path, ...]
    ) -> tuple[str, Values | None]:
        """The name of the file for these rows, and its values, which the first process reads for all."""
        found: tuple[str, Values | None] = ("", None)
        if _rank() == 0:
            name = file_name(rows.rows, model)
            found = name, load(directories, name)
        return _from_first(found)

    def _keep(self, name: str, values: Values) -> None:
        """Writes the file where it isn't yet."""
        if _rank() == 0:
            save((directory for directory in self._directories if not (directory / name).exists()), name, values)

    def _forget(self, name: str) -> None:
        """Removes the files of other weights."""
        if _rank() == 0:
            remove(self._directories, name)

    def _agrees(self, rows: ReferenceRows, values: Values, batch: list[int], score: Score) -> bool:
        """Whether the values are those that the model gives for one batch."""
        starts = np.concatenate([[0], np.cumsum(values[1])])
        kept = np.concatenate([values[0][starts[i] : starts[i + 1]] for i in batch])
        now = np.concatenate(score_batch(rows.rows, batch, score))
        return _from_first(len(now) == 0 or float(np.abs(kept - now).mean()) <= self._tolerance)


def _unfilled(sets: dict[str, Any]) -> dict[str, ReferenceRows]:
    """The rows that lack the column, by what they are called."""
    return {
        f"{what} {name}".rstrip(): rows
        for what, dataset in sets.items()
        for name, rows in rows_to_fill(dataset).items()
    }


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _from_first(value: Any) -> Any:
    """What the first process has, on all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
