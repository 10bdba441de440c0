"""A causal language model that scores rows: loaded on each rank, asked without padding where it can be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, logging

from dft.batching.attention import choose_attention
from dft.batching.collators import FlatteningCollator, PaddingCollator, document_lengths
from dft.batching.leak_check import LeakCheck
from dft.batching.plan import choose_batching
from dft.constants import IGNORE_INDEX
from dft.distributed import NODE_WORK_TIMEOUT, has_accelerator, join_on_cpu
from dft.loss.scorer import Scorer
from dft.loss.token_weight import TokenWeight
from dft.model.fit import check_positions, check_vocabulary, ids_in
from dft.model.trained import load_trained
from dft.selection.model_rows import model_directories

# MB of logits at once. On a processor, more memory than some 30 MB comes from the system anew each time, which takes
# longer than computing the logits
CHUNK_MB = {"cpu": 16.0}
CHUNK_MB_ELSEWHERE = 256.0
Row = dict[str, Any]  # input_ids and labels, int32 [T]


@dataclass
class ScoringModel:
    """A model ready to score rows; none of its weights changes.

    Attributes:
        name: of the directory that it comes from.
        is_padded: whether batches are padded; else rows lie one after the other.
    """

    name: str
    model: PreTrainedModel  # or a PeftModel
    base: PreTrainedModel  # the same, or what the PeftModel has put its adapters into
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    is_padded: bool

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model, "auto", CHUNK_MB.get(self.device.type, CHUNK_MB_ELSEWHERE))

    @cached_property
    def _leak_check(self) -> LeakCheck:
        return LeakCheck(self.model.config.get_text_config().vocab_size)

    @cached_property
    def _collator(self) -> Callable[[list[Row]], dict[str, Any]]:
        return PaddingCollator(self.tokenizer) if self.is_padded else FlatteningCollator()

    @property
    def directories(self) -> list[Path]:
        """Where the model's files are, and those of an adapter's base model."""
        return model_directories(Path(self.name), self.base)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides over the numbers beside the model's files and the rows, as JSON values."""
        return {"dtype": str(self.model.dtype)}

    def check_rows(self, ids: Sequence[np.ndarray]) -> None:
        """Raises UserError where the model has no row for a token, or no position for the longest row.

        Args:
            ids: tokens of each row, int [T].
        """
        config = self.model.config
        check_vocabulary(config, self.tokenizer, ids_in(ids), self.is_padded)
        check_positions(config, max(map(len, ids), default=0), self.is_padded)

    def log_p(self, rows: list[Row]) -> Tensor:
        """log p of the supervised tokens of some rows, row by row, float32 [N]."""
        inputs = self._inputs(rows)
        labels = inputs.pop("labels")
        with torch.no_grad():
            _, tokens, _ = self._scorer.score(self.model, inputs, labels, TokenWeight(0.0))
        return -tokens.nll

    def mean_hidden(self, ids: list[np.ndarray]) -> Tensor:
        """The mean over the tokens of each row of the last hidden states, float32 [B, H].

        Args:
            ids: tokens of each row, int [T].
        """
        inputs = self._inputs([{"input_ids": row, "labels": np.full(len(row), IGNORE_INDEX)} for row in ids])
        inputs.pop("labels")
        with torch.no_grad():
            hidden = self.base.base_model(**inputs).last_hidden_state.float()
        if self.is_padded:
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            return (hidden * mask).sum(1) / mask.sum(1)
        lengths = document_lengths(inputs).tolist()
        return torch.stack([document.mean(0) for document in hidden[0].split(lengths)])

    def _inputs(self, rows: list[Row]) -> dict[str, Any]:
        if self.is_padded:  # transformers' collator takes arrays one number at a time
            rows = [{name: values.tolist() for name, values in row.items()} for row in rows]
        batch = self._collator(rows)
        inputs = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        self._leak_check(self.model, {name: value for name, value in inputs.items() if name != "labels"})
        return inputs


def join_ranks(device: str) -> torch.device:
    """Joins the processes of a launcher, if there is one; returns the device of this rank.

    Args:
        device: auto or cpu.
    """
    if device == "cpu" or not has_accelerator():
        join_on_cpu(NODE_WORK_TIMEOUT)
        return PartialState(cpu=True).device
    return PartialState(timeout=NODE_WORK_TIMEOUT).device


def load_scoring_model(
    directory: Path, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> ScoringModel:
    """A model or an adapter on the device of this rank. All ranks must call it together.

    Raises:
        UserError: it can't be loaded, see load_trained.
    """
    place = join_ranks(device)
    logging.disable_progress_bar()
    trained = load_trained(directory, place, dtype, trust_remote_code)
    model = trained.model
    attention = choose_attention("auto", model.config, model.dtype.itemsize == 2)
    is_padded = choose_batching(None, model.config, attention) == "padded"
    base = model.get_base_model() if trained.is_adapter else model
    if not is_padded:
        base.set_attn_implementation(attention)
    return ScoringModel(str(directory), model, base, trained.tokenizer, place, is_padded)
