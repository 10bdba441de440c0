"""Talk to a model that was trained here.

    python scripts/chat.py outputs/dft                                    # a conversation
    python scripts/chat.py outputs/dft "What is the capital of France?"   # one answer
    echo "What is the capital of France?" | python scripts/chat.py outputs/dft --system "Be brief."

The directory holds a whole model, a checkpoint, or an adapter; an adapter's base model is found by its configuration.
"""

import signal

if __name__ == "__main__":  # the imports below take seconds, in which Ctrl-C would show a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends where nobody reads on: chat.py … | head

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import logging
from transformers.generation.streamers import BaseStreamer

from dft.chat.turn_finder import TEMPLATE_ERRORS
from dft.errors import UserError
from dft.model.trained import DTYPES, TrainedModel, find_device, load_trained
from dft.program import program

HELP = "/reset forgets the conversation, /exit or an empty line ends it, Ctrl-C ends an answer."
INTERRUPTED_STATUS = 130


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a trained model or adapter")
    parser.add_argument("prompt", nargs="?", help="what to say; else all of a pipe; else a conversation")
    parser.add_argument("--system", help="system prompt; a small model wants the one of its training")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="length of an answer; by default 512")
    parser.add_argument("--temperature", type=float, default=0.0, help="by default 0: the likeliest token every time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="by default what the model is saved in")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise UserError("--max_new_tokens must be at least 1, and --temperature at least 0")
    device = find_device(args.device)
    prompt = args.prompt if args.prompt is not None or sys.stdin.isatty() else read_pipe()
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty")
    logging.disable_progress_bar()
    trained = load_trained(args.model, device, args.dtype, args.trust_remote_code)
    chat = Chat(trained, args.system, args.max_new_tokens, args.temperature)
    if prompt is None:
        converse(chat)
    else:
        chat.answer(prompt)


def read_pipe() -> str:
    """All of the standard input."""
    sys.stdin.reconfigure(errors="strict")
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"the piped prompt is not text: {error}") from error


class Printer(BaseStreamer):
    """Prints tokens as they are made, without special tokens; `ids` holds those of the answer."""

    def __init__(self, tokenizer):
        self.ids: list[int] = []
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self._is_prompt = True
        # a token is decoded behind the last printed ones, because some tokenizers drop a blank in front
        self._context, self._printed = 0, 0

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self._waiting()
        if not text.endswith("\ufffd"):  # a character made of several tokens, of which some are missing
            print(text, end="", flush=True)
            self._context, self._printed = self._printed, len(self.ids)

    def end(self) -> None:
        print(self._waiting(), flush=True)

    def _waiting(self) -> str:
        before = self._decode(self.ids[self._context : self._printed])
        return self._decode(self.ids[self._context :])[len(before) :]


class Chat:
    """A conversation with a model."""

    def __init__(self, trained: TrainedModel, system: str | None, max_new_tokens: int, temperature: float):
        self.model, self.tokenizer = trained.model, trained.tokenizer
        self.max_new_tokens = max_new_tokens
        self.context = self.model.config.get_text_config().to_dict().get("max_position_embeddings", sys.maxsize)
        self.settings = copy.deepcopy(self.model.generation_config)
        self.end_tokens = trained.end_tokens
        self.settings.update(eos_token_id=self.end_tokens or None, do_sample=temperature > 0, max_length=None)
        if self.settings.pad_token_id is None and self.end_tokens:
            self.settings.pad_token_id = self.end_tokens[0]  # nothing is padded, but its lack is warned of
        if temperature > 0:
            self.settings.temperature = temperature
        else:
            # neutral: a model's own values are for sampling, and would be taken where these are None
            self.settings.update(temperature=1.0, top_p=1.0, top_k=50)
        self.first = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forgets what was said, but for the system prompt."""
        self.messages = list(self.first)

    def answer(self, said: str) -> str:
        """Prints the model's answer while it is made. Ended by Ctrl-C, it is kept as far as it got.

        Raises:
            UserError: the conversation is too long for the model or the device, or the chat template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": said}]
        inputs = self._tokens(messages).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        if length >= self.context:
            raise UserError(f"the conversation has {length} tokens, and the model takes {self.context}")
        self.settings.max_new_tokens = min(self.max_new_tokens, self.context - length)
        printer = Printer(self.tokenizer)
        try:
            self.model.generate(**inputs, generation_config=self.settings, streamer=printer)
        except KeyboardInterrupt:
            printer.end()
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.model.device} has no memory for {length} tokens and their answer: {error}"
            ) from error
        finally:
            text = self.tokenizer.decode(printer.ids, skip_special_tokens=True)
            if text:
                self.messages = [*messages, {"role": "assistant", "content": text}]
        if printer.ids[-1] not in self.end_tokens:
            full = self.settings.max_new_tokens < self.max_new_tokens
            why = f"the model's context of {self.context} tokens is full" if full else "see --max_new_tokens"
            print(f"(cut after {len(printer.ids)} tokens: {why})", file=sys.stderr)
        return text

    def _tokens(self, messages: list[dict[str, str]]):
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        except TEMPLATE_ERRORS as error:
            raise UserError(f"the model's chat template refuses the conversation: {error}") from error


def converse(chat: Chat, ask: Callable[[str], str] = input) -> None:
    """Answers what `ask` returns, until an empty line, /exit, or the end of the input."""
    print(HELP)
    while True:
        try:
            said = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said in ("", "/exit"):
            return
        if said == "/reset":
            chat.reset()
            continue
        try:
            chat.answer(said)
        except UserError as error:
            print(f"({error}; /reset begins a new one)")
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with program():
            main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_STATUS)
