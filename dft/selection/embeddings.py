"""Embeddings of instructions: by a language model's hidden states, by sentence-transformers, or from a file.

The instruction of a row is what its users say: the text of all user messages, in order. Without its chat template,
whose tokens are the same in all rows.

Shapes: R rows, H dimensions, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from dft.errors import UserError
from dft.printable import printable
from dft.reading.rows import Conversation
from dft.reference.scoring import Batch
from dft.selection.model_flags import ModelFlags
from dft.selection.model_rows import compute_rows, shard_directory, share_batches
from dft.selection.scoring_model import ScoringModel, join_ranks

SENTENCE_MODEL = "modules.json"  # the file that a directory of sentence-transformers has
TEXTS_AT_ONCE = 512  # that sentence-transformers gets; it sorts and cuts them into batches itself


def instruction(row: Conversation) -> str:
    """The text of all user messages; "" where the users say nothing."""
    texts = [message["content"] or "" for message in row.messages if message["role"] == "user"]
    return "\n\n".join(text for text in texts if text.strip())


def embed_instructions(
    rows: Sequence[Conversation], flags: ModelFlags, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that have an instruction, int64, and their embeddings; see embed. Without any, no model is loaded."""
    texts = [instruction(row) for row in rows]
    embedded = np.flatnonzero([bool(text) for text in texts])
    if len(embedded) == 0:
        return embedded, np.zeros((0, 0), dtype=np.float32)
    return embedded, embed([texts[i] for i in embedded], flags, max_length)


def embed(texts: Sequence[str], flags: ModelFlags, max_length: int) -> np.ndarray:
    """Embeddings of texts on every rank, float32 [R, H]. All ranks must call it together.

    Args:
        flags: of a directory of sentence-transformers, or of a causal language model.
        max_length: longer texts are cut, in tokens.

    Raises:
        UserError: the model can't be loaded, or its package is missing.
    """
    if (flags.directory / SENTENCE_MODEL).is_file():
        return sentence_embeddings(texts, flags, max_length)
    return mean_hidden_states(texts, flags.load(), max_length, flags.tokens_at_once, flags.cache_dir)


def mean_hidden_states(
    texts: Sequence[str],
    model: ScoringModel,
    max_length: int = 8192,
    tokens_at_once: int = 8192,
    cache: Path | None = None,
) -> np.ndarray:
    """The mean over each text's tokens of the model's last hidden states, float32 [R, H]; see embed.

    Args:
        cache: for shards, see shard_directory.

    Raises:
        UserError: the model gives numbers that aren't finite.
    """
    encoded = model.tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if texts else []
    ids = [np.array(row, dtype=np.int32) for row in encoded]
    model.check_rows(ids)

    def hidden(batch: Batch) -> np.ndarray:
        return model.mean_hidden([ids[index] for index in batch]).cpu().numpy()

    lengths = np.array([len(row) for row in ids])
    directory = shard_directory(cache, "embeddings", model.directories, ids, model.settings)
    found = compute_rows(lengths, hidden, tokens_at_once, directory)
    if not np.isfinite(found).all():
        raise UserError(f"{model.name} gives hidden states that aren't finite: its weights are damaged")
    return found


def sentence_embeddings(texts: Sequence[str], flags: ModelFlags, max_length: int) -> np.ndarray:
    """Embeddings by sentence-transformers, as that normalizes and pools them; see embed."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            f"{printable(flags.directory)} holds a model of sentence-transformers ({error}): "
            "pip install sentence-transformers"
        ) from error
    device = str(join_ranks(flags.device))
    encoder = SentenceTransformer(
        str(flags.directory), device=device, trust_remote_code=flags.trust_remote_code, local_files_only=True
    )
    encoder.max_seq_length = min(max_length, encoder.max_seq_length or max_length)
    batches = [
        list(range(start, min(start + TEXTS_AT_ONCE, len(texts)))) for start in range(0, len(texts), TEXTS_AT_ONCE)
    ]
    found = share_batches(batches, lambda batch: encoder.encode([texts[i] for i in batch], show_progress_bar=False))
    return np.stack([found[index] for index in range(len(texts))]).astype(np.float32)


def read_embeddings(path: Path, flag: str, num_rows: int | None = None) -> np.ndarray:
    """The array of a file of numpy, float32 [R, H].

    Args:
        flag: that names the file, for messages.
        num_rows: that the file must hold; None for any.

    Raises:
        UserError: it isn't such a file.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{flag} {printable(path)} is not a file of numpy.save: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or not np.issubdtype(found.dtype, np.floating):
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "several arrays"
        raise UserError(f"{flag} {printable(path)} holds {kind}: one array of numbers [rows, dimensions] is needed")
    if num_rows is not None and len(found) != num_rows:
        raise UserError(
            f"{flag} {printable(path)} has {len(found):,} rows for {num_rows:,} valid rows of --data_files: they must "
            "be of the same rows in the same order"
        )
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is told with its row
        return found.astype(np.float32)
