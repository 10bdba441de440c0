"""Export a trained model to a directory of its own, to serve, share or quantize it.

    python scripts/export.py outputs/my-lora --output outputs/my-model                  # adapter merged into its base
    python scripts/export.py outputs/dft/checkpoint-200 --output outputs/my-model --dtype bfloat16

It gets the weights as safetensors, the tokenizer with its chat template, a generation config with the tokens that end
an answer, and the README.md beside the model, if there is one.
"""

from dft.program import program, quiet_imports

if __name__ == "__main__":  # before the imports that this is about
    quiet_imports()

import argparse
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import logging

from dft.errors import UserError
from dft.files import path_argument
from dft.model.adapters import has_tied_head_adapted
from dft.model.trained import DTYPES, TrainedModel, load_trained
from dft.printable import printable


def main(argv: list[str] | None = None) -> None:
    """Loads the model, merges an adapter, and writes the directory.

    Raises:
        UserError: a flag outside its range, a model that can't be loaded, or an output that can't be written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=path_argument, help="directory of an adapter, a model or a checkpoint")
    parser.add_argument(
        "--output", type=path_argument, required=True, help="an empty directory; it is made if it is missing"
    )
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="by default what the model is saved in")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--max_shard_size", default="5GB", help="size of a file of weights; by default 5GB")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\d+[KMGT]B", args.max_shard_size):
        raise UserError(f"--max_shard_size {args.max_shard_size}: give a number and a unit, such as 500MB or 5GB")
    check_output(args.output)
    logging.disable_progress_bar()
    # merged in the dtype of the base model and converted afterwards, so that its weights are rounded only once
    trained = merge_adapter(load_trained(args.model, trust_remote_code=args.trust_remote_code))
    if args.dtype != "auto":
        trained.model.to(getattr(torch, args.dtype))
    save(trained, args.output, args.max_shard_size)
    if (args.model / "README.md").is_file():
        shutil.copyfile(args.model / "README.md", args.output / "README.md")
    size = sum(path.stat().st_size for path in args.output.glob("*.safetensors")) / 2**20
    print(
        f"{printable(args.output)}: {type(trained.model).__name__}, {trained.model.dtype}, {size:,.1f} MiB of weights"
    )


def check_output(path: Path) -> None:
    """Makes the directory before the model is loaded, which may take minutes.

    Raises:
        UserError: it isn't empty, or can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_empty = not any(path.iterdir())
    except OSError as error:
        raise UserError(f"--output {path} can't be made: {error.strerror}") from error
    if not is_empty:
        raise UserError(f"--output {path} isn't empty: give a new directory, or empty it")


def merge_adapter(trained: TrainedModel) -> TrainedModel:
    """Merges the adapter into the weights; returns a model without an adapter as it is.

    A head that is tied to the embedding and has an adapter is untied: the embedding has none.

    Raises:
        UserError: an adapter of this kind has no weights to merge.
    """
    if not trained.is_adapter:
        return trained
    if trained.model.active_peft_config.is_prompt_learning:
        kind = trained.model.active_peft_config.peft_type.value
        raise UserError(f"an adapter of the kind {kind} puts tokens before the prompt, and can't be merged")
    is_untied = has_tied_head_adapted(trained.model)
    if is_untied:
        head = trained.model.get_output_embeddings()
        head.base_layer.weight = nn.Parameter(head.base_layer.weight.detach().clone())
    merged = trained.model.merge_and_unload()
    if is_untied:
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    return replace(trained, model=merged, is_adapter=False)


def save(trained: TrainedModel, path: Path, max_shard_size: str) -> None:
    """Writes model, tokenizer and generation config.

    Raises:
        UserError: they can't be written.
    """
    trained.model.generation_config.eos_token_id = trained.end_tokens or None
    try:
        trained.model.save_pretrained(path, max_shard_size=max_shard_size)
        trained.tokenizer.save_pretrained(path)
    except OSError as error:
        raise UserError(f"--output {path} can't be written: {error}") from error


if __name__ == "__main__":
    with program():
        main()
