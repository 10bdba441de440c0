"""Scores by a reward model, or by a sequence classifier.

A reward model has one output, which is the score as it is. Of a classifier with more, the score is the probability of
one label.

Shapes: R rows, B rows of a batch, L labels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, logging

from dft.chat.template import TEMPLATE_ERRORS
from dft.errors import UserError
from dft.model.fit import GROWING_TABLES, TABLE_OFFSET, check_positions, check_vocabulary, ids_in, is_rotary
from dft.model.tokenizer import load_tokenizer
from dft.model.trained import MODEL_ERRORS
from dft.pickles import check_model
from dft.printable import printable
from dft.reading.rows import Conversation, RowError
from dft.selection.model_flags import ModelFlags
from dft.selection.model_rows import compute_rows, shard_directory
from dft.selection.scoring_model import join_ranks

RELATIVE = "rel_embeddings"  # DeBERTa's table of distances, which are cut to its size
NO_LIMIT = 10**6  # tokenizers without a longest length say a number above this


class RewardModel:
    """A reward model or classifier on the device of this rank. All ranks must make it together.

    Args:
        label: of a classifier with several, its name or number; None for a model with one output.

    Raises:
        UserError: it can't be loaded, its head isn't in its files, or the label isn't one of its labels.
    """

    def __init__(self, flags: ModelFlags, label: str | None = None):
        device = join_ranks(flags.device)
        self.name = flags.directory
        self.model = _load(flags).to(device).eval()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            str(self.name), printable(self.name), trust_remote_code=flags.trust_remote_code
        )
        self.label = label_index(self.model, label, printable(self.name))
        if self.model.config.pad_token_id is None:  # by which a decoder finds the last token of a row
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.padding_side = "right"

    def scores(
        self, rows: Sequence[Conversation], max_length: int | None, tokens_at_once: int, cache: Path | None
    ) -> tuple[np.ndarray, dict[int, RowError]]:
        """The score of each row on every rank, float64 [R], NaN for the rows that have none, and why they haven't.

        All ranks must call it together.

        Args:
            max_length: of a row in tokens; None for what the model takes.
            cache: for shards, see shard_directory.

        Raises:
            UserError: a score isn't finite.
        """
        limit = self._limit(max_length)
        encoded: dict[int, dict[str, list[int]]] = {}
        refusals: dict[int, RowError] = {}
        for index, row in enumerate(rows):
            try:
                encoded[index] = self.encode(row, limit)
            except RowError as error:
                refusals[index] = error
        items = list(encoded.values())
        self._check([np.array(item["input_ids"]) for item in items])
        seen = [np.concatenate([np.array(value, dtype=np.int32) for value in item.values()]) for item in items]
        settings = {"label": self.label, "dtype": str(self.model.dtype)}
        directory = shard_directory(cache, "quality", [self.name], seen, settings)
        lengths = np.array([len(item["input_ids"]) for item in items], dtype=np.int64)
        found = compute_rows(lengths, lambda batch: self._scores([items[i] for i in batch]), tokens_at_once, directory)
        if not np.isfinite(found).all():
            row = rows[list(encoded)[int(np.flatnonzero(~np.isfinite(found))[0])]]
            place = f"{printable(row.path)}:{row.line}"
            raise UserError(f"{printable(self.name)} gives scores that aren't finite, the first for {place}")
        scores = np.full(len(rows), np.nan)
        scores[list(encoded)] = found
        return scores, refusals

    def encode(self, row: Conversation, limit: int | None = None) -> dict[str, list[int]]:
        """What the model sees of a row: by its own chat template, else what precedes the last answer and that answer.

        Raises:
            RowError: the template refuses the row, or it is longer than `limit` tokens.
        """
        messages = row.up_to_last_answer()
        if self.tokenizer.chat_template:
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, row.tools, tokenize=False, **(row.template_kwargs or {})
                )
            except TEMPLATE_ERRORS as error:
                raise RowError(
                    "template_error", f"the reward model's chat template refuses the row: {error}"
                ) from error
            encoded = self.tokenizer(text, add_special_tokens=False)
        else:
            before = "\n\n".join(message["content"] for message in messages[:-1] if message["content"])
            encoded = self.tokenizer(before, messages[-1]["content"] or "")
        length = len(encoded["input_ids"])
        if limit is not None and length > limit:
            raise RowError("too_long", f"{length} tokens, more than the {limit} that the reward model is given")
        return dict(encoded)

    def _limit(self, max_length: int | None) -> int | None:
        own = self.tokenizer.model_max_length
        limits = [max_length, own if own < NO_LIMIT else None, positions(self.model)]
        limits = [limit for limit in limits if limit is not None]
        return min(limits, default=None)

    def _check(self, ids: list[np.ndarray]) -> None:
        check_vocabulary(self.model.config, self.tokenizer, ids_in(ids), is_padded=True)
        check_positions(self.model.config, max(map(len, ids), default=0), is_padded=False)

    def _scores(self, items: list[dict[str, Any]]) -> np.ndarray:
        """The scores of a batch, float64 [B]."""
        inputs = self.tokenizer.pad(items, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            logits = self.model(**inputs).logits.double()  # [B, L]
        if self.label is None:
            return logits[:, 0].cpu().numpy()
        is_multiple = self.model.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if is_multiple else logits.softmax(-1)
        return probabilities[:, self.label].cpu().numpy()


def _load(flags: ModelFlags) -> PreTrainedModel:
    logging.disable_progress_bar()
    what = printable(flags.directory)
    check_model(flags.directory)
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            str(flags.directory),
            dtype=flags.dtype,
            trust_remote_code=flags.trust_remote_code,
            output_loading_info=True,
        )
    except MODEL_ERRORS as error:
        raise UserError(f"{what}: the reward model can't be loaded: {error}") from error
    if found["missing_keys"]:
        raise UserError(
            f"{what} is not a reward model or a sequence classifier: its files lack "
            f"{', '.join(sorted(found['missing_keys'])[:3])}, which would be random"
        )
    return model


def positions(model: PreTrainedModel) -> int | None:
    """The tokens that a model's table of positions has room for; None where it has no such table."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not limit or limit < 0 or is_rotary(config) or config.model_type in GROWING_TABLES:
        return None
    vocabulary = model.get_input_embeddings()
    rooms = [
        len(buffer) for buffer in model.buffers() if buffer.ndim == 2 and 0 <= len(buffer) - limit <= TABLE_OFFSET
    ]
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and module is not vocabulary and not name.endswith(RELATIVE)
        if is_table and 0 <= module.num_embeddings - limit <= TABLE_OFFSET:
            # positions are counted from behind that of the padding, where there is one
            rooms.append(limit if module.padding_idx is None else module.num_embeddings - module.padding_idx - 1)
    return min([limit, *rooms]) if rooms else None


def label_index(model: PreTrainedModel, label: str | None, what: str) -> int | None:
    """The number of a label; None for a model with one output.

    Raises:
        UserError: there is no such label, or several and none is given.
    """
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    listed = ", ".join(printable(name) for name in names)
    if len(names) == 1:
        if label is not None:
            raise UserError(f"--label {printable(label)}: {what} has one score and no labels; leave the flag out")
        return None
    if label is None:
        raise UserError(f"{what} gives {len(names)} scores and not one: choose a --label of {listed}")
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    raise UserError(f"--label {printable(label)} is not one of {what}: {listed}")
