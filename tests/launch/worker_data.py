"""Rows and a tokenizer for the workers that test files start on several processes."""

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from examples.make_example_data import dialogues_zh, facts_en
from examples.make_tiny_model import make_tokenizer, strings

VOCAB_SIZE = 400
SOURCES = ("facts", "dialogues", "rare")


def small_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(strings(facts_en()[:20] + dialogues_zh()[:5]), vocab_size=VOCAB_SIZE)


def uneven_rows(count: int, seed: int = 0) -> Dataset:
    """Rows of 6 to 62 tokens, of which every fifth supervises nothing; one of the three sources has few rows.

    Tokens come in pairs, because an untrained model with tied embeddings expects the token that it has just seen.
    """
    generator = torch.Generator().manual_seed(seed)
    data = []
    for i in range(count):
        ids = torch.randint(300, (3 + 4 * (i % 8),), generator=generator).repeat_interleave(2).tolist()
        start = len(ids) if i % 5 == 3 else len(ids) // 3
        source = SOURCES.index("rare") if i % 11 == 7 else i % 2
        data.append({"input_ids": ids, "labels": [-100] * start + ids[start:], "channel": source})
    return Dataset.from_list(data)
