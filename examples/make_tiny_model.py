"""Make a small Qwen3-architecture model with random weights and a byte-level BPE tokenizer with ChatML tokens.

    python examples/make_tiny_model.py outputs/tiny-random --data examples/data

Nothing is downloaded, and the same arguments give the same model. The tokenizer learns its merges from the text of the
data files.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, logging

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# single tokens, but not control tokens, because they are part of the text that assistants write
TAG_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def texts(directory: Path) -> Iterator[str]:
    """Yields all strings in the JSON and JSONL files of a directory, in the order of their names."""
    for path in sorted(directory.glob("*.json*")):
        content = path.read_text(encoding="utf-8")
        rows = json.loads(content) if content.lstrip()[0] == "[" else [json.loads(x) for x in content.splitlines()]
        yield from strings(rows)


def strings(value: object) -> Iterator[str]:
    """Yields the strings inside a JSON value, but not the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def make_tokenizer(corpus: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer whose turns end with <|im_end|>.

    It has no chat template, so that training uses the built-in ChatML template.

    Args:
        corpus: texts to learn merges from.
        vocab_size: tokens, including special ones.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAG_TOKENS),
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(TAG_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )


def make_model(vocab_size: int, hidden_size: int, num_layers: int, seed: int = 0) -> Qwen3ForCausalLM:
    """Makes a Qwen3 model with random float32 weights."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=CONTROL_TOKENS.index("<|im_end|>"),
        pad_token_id=CONTROL_TOKENS.index("<|endoftext|>"),
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def main() -> None:
    """Writes the model and its tokenizer to the directory of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="directory of .json and .jsonl files")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=4)
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = make_tokenizer(texts(args.data), args.vocab_size)
    model = make_model(args.vocab_size, args.hidden_size, args.num_layers)
    tokenizer.save_pretrained(args.output_dir)
    model.save_pretrained(args.output_dir)
    size = model.num_parameters() / 1e6
    print(f"{args.output_dir}: {size:.2f} M parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
