"""The public data functions: chat files to tokenized datasets, for the program and for notebooks.

    config = DataConfig(data_files=["data/"], max_length=4096)            # as the flags of train_dft.py
    data = prepare_data(config, ChatFormat(tokenizer))
    data.train, data.evaluation, data.report

    rows = [row for row in load_conversations(["chats.jsonl"]) if isinstance(row, Conversation)]
    dataset, rejected = tokenize_dataset(rows, ChatFormat(tokenizer), max_length=8192)

    kept, dropped = clean_rows(rows, CleanConfig(min_characters=50))      # as scripts/select_data.py
    clusters = near_duplicates(kept)

A row's way: dft/reading makes a conversation of it, dft/chat its token ids and labels, dft/data a row of a dataset.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from datasets import Dataset

from dft.chat.format import ChatFormat
from dft.config.data import DataConfig, Truncation
from dft.data.build import build
from dft.data.cache import CACHE_DIRECTORY, cached, data_key
from dft.data.pipeline import arrow_table, stack_examples, tokenize_conversations
from dft.data.prepared import PreparedData, load_prepared
from dft.data.sources import find_sources
from dft.distributed import once_per_node
from dft.reading.formats import read_file
from dft.reading.rows import Conversation, RejectedRow
from dft.reading.untrainable import reject_untrainable
from dft.selection.clean import CleanConfig as CleanConfig
from dft.selection.clean import clean_rows as clean_rows
from dft.selection.contamination import contaminated_rows as contaminated_rows
from dft.selection.k_center import k_center_greedy as k_center_greedy
from dft.selection.near_duplicates import near_duplicates as near_duplicates

# settings that don't change what is in the cache, or that are in its key in another form
NOT_IN_KEY = {
    *("data_files", "eval_data_files", "data_weights", "mix", "mix_by", "stages", "chat_template", "channels"),
    *("train_on", "mask_thinking", "empty_turns", "chat_template_kwargs"),
    *("preprocessing_num_workers", "data_cache_dir", "shared_files", "overwrite_cache"),
    *("debug_data_processing", "dry_run"),
}


def load_conversations(
    paths: Iterable[str], data_format: str = "auto", role_map: dict[str, str] | None = None
) -> Iterator[Conversation | RejectedRow]:
    """Reads and validates files, row by row: conversations, and the rows that are broken or teach nothing.

    Args:
        data_format: one of dft.config.data.FORMATS, or auto: told for each file by its columns.
        role_map: other names of roles, {name: role}.

    Raises:
        UserError: a file can't be opened.
    """
    for path in paths:
        yield from map(reject_untrainable, read_file(path, data_format, role_map))


def tokenize_dataset(
    conversations: Iterable[Conversation],
    chat_format: ChatFormat,
    max_length: int = DataConfig.max_length,
    truncation: Truncation = DataConfig.truncation,
) -> tuple[Dataset, list[RejectedRow]]:
    """A dataset in memory, with the columns of PreparedData, and the rows that are not in it."""
    rows = list(conversations)
    results = tokenize_conversations(rows, chat_format, max_length, truncation)
    tokens = stack_examples(results, rows)
    return Dataset(arrow_table(tokens, has_weights=tokens.weights is not None)), tokens.rejected


def prepare_data(
    config: DataConfig, chat_format: ChatFormat, *, seed: int = 42, progress: bool = True
) -> PreparedData:
    """From files to tokenized training and evaluation rows, kept in a cache.

    Args:
        seed: of the samples and of the rows that are held out.
        progress: show progress bars.

    Raises:
        UserError: files are missing, rows are refused, or nothing is left to train or to evaluate on.
    """
    return load_prepared(prepare_in_cache(config, chat_format, seed=seed, progress=progress), config.channels)


def prepare_on_each_node(
    config: DataConfig, chat_format: ChatFormat, *, seed: int, progress: bool = False
) -> PreparedData:
    """As `prepare_data`, called by all ranks: one process of each node prepares the rows, all of them read these."""
    prepare = partial(prepare_in_cache, config, chat_format, seed=seed, progress=progress)
    return load_prepared(once_per_node(prepare), config.channels)


def prepare_in_cache(config: DataConfig, chat_format: ChatFormat, *, seed: int, progress: bool) -> Path:
    """The directory of the cache that holds the prepared data, made if it isn't there yet."""
    sources = find_sources(config)
    described = {name: value for name, value in asdict(config).items() if name not in NOT_IN_KEY}
    described |= chat_format.settings | {"seed": seed, "mix": [config.mix, config.mix_by] if config.mix else None}
    key = data_key([file.path for file in sources.files], chat_format.tokenizer, described | asdict(sources))
    fill = partial(build, sources=sources, config=config, chat_format=chat_format, seed=seed, progress=progress)
    directory = Path(config.data_cache_dir or CACHE_DIRECTORY).expanduser()
    return cached(directory, key, fill, config.overwrite_cache, shared=config.shared_files)
