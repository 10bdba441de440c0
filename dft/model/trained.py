"""Load a trained model for use: a whole model, a checkpoint, or an adapter with its base model."""

import warnings
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dft.chat.format import ChatFormat
from dft.errors import UserError
from dft.model.tokenizer import LOADING_ERRORS, load_tokenizer, special_token_ids
from dft.pickles import check_model
from dft.reading.rows import RowError

DTYPES = ("auto", "float32", "bfloat16", "float16")
ANSWERS = ("Hello.", "It is 42")  # which end differently
MODEL_ERRORS = (*LOADING_ERRORS, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to generate."""

    model: PreTrainedModel  # a PeftModel if is_adapter
    tokenizer: PreTrainedTokenizerBase
    end_tokens: list[int]  # ids that end an answer
    is_adapter: bool


def find_device(name: str) -> torch.device:
    """The device of that name; for "auto" the accelerator, where there is one.

    Raises:
        UserError: this machine hasn't got it.
    """
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such kind of device; use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cpu":
        return device
    if there is None:
        raise UserError(f"--device {name} isn't there; this machine has cpu and no accelerator that torch can use")
    count = torch.accelerator.device_count()
    if device.type != there.type or (device.index or 0) >= count:
        raise UserError(f"--device {name} isn't there; this machine has cpu and {count} x {there}")
    return device


def load_trained(
    directory: Path, device: torch.device | str = "cpu", dtype: str = "auto", trust_remote_code: bool = False
) -> TrainedModel:
    """Loads a model or an adapter, its tokenizer, and the tokens that end an answer.

    Args:
        dtype: of DTYPES; "auto" is the one that the (base) model is saved in.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: the directory holds neither, peft or the base model is missing, or a file can't be loaded.
    """
    is_adapter = (directory / "adapter_config.json").is_file()
    if not is_adapter and not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not a model directory: neither config.json nor adapter_config.json is in it")
    try:
        check_model(directory)
        load = load_adapter if is_adapter else load_model
        model = load(str(directory), dtype, trust_remote_code).to(device).eval()
        has_tokenizer = (directory / "tokenizer_config.json").is_file()
        source = model.name_or_path if is_adapter and not has_tokenizer else str(directory)
        tokenizer = load_tokenizer(source, str(directory), trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except MODEL_ERRORS as error:
        raise UserError(f"{directory}: the model can't be loaded: {error}") from error
    return TrainedModel(model, tokenizer, find_end_tokens(model, tokenizer), is_adapter)


def load_model(name: str, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    # False, and not the default: that asks on the terminal
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)


def load_adapter(directory: str, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    """A PeftModel: the base model that the adapter's own configuration names, with the adapter in it."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise UserError(f"{directory} holds an adapter, which needs peft ({error}): pip install peft") from error
    if not any(Path(directory).glob("adapter_model.*")):
        raise UserError(f"{directory} has no adapter_model.safetensors beside its adapter_config.json: copy all of it")
    name = PeftConfig.from_pretrained(directory).base_model_name_or_path
    check_model(name)
    try:
        base = load_model(name, dtype, trust_remote_code)
    except MODEL_ERRORS as error:
        raise UserError(
            f"{directory} is an adapter, and its base model {name} can't be loaded: {error}\nIf the base model lies "
            "elsewhere now, mend base_model_name_or_path in adapter_config.json"
        ) from error
    with warnings.catch_warnings():  # peft asks transformers by names that are deprecated there
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(base, directory)


def find_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the model's own, the tokenizer's, and what the chat template ends a turn with.

    A base model's own end token is often not the one that turns were trained to end with.
    """
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, turn_end_token(ChatFormat(tokenizer))}
    return sorted(ends - {None})


def turn_end_token(chat_format: ChatFormat) -> int | None:
    """The id of the token that an assistant turn is trained to end with; None if turns have none of their own.

    It is the last special or added token after what the assistant says. The last supervised token alone wouldn't do:
    it may be a line break, or the full stop of the answer, where a template doesn't mark the end of a turn.
    """
    tokenizer = chat_format.tokenizer
    endings = []  # of the labels, backwards
    try:
        for answer in ANSWERS:
            probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
            labels = chat_format.encode(probe).labels
            endings.append(labels[labels >= 0][::-1].tolist())
    except RowError:
        return None  # a template that doesn't take this conversation
    after_answer = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*endings, strict=False))]
    marks = {*tokenizer.added_tokens_decoder, *special_token_ids(tokenizer)}
    return next((token for token in after_answer if token in marks), None)
