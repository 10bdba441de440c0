"""Chat with a trained model: a conversation in the terminal, or one answer.

    python scripts/chat.py outputs/dft                                    # a conversation
    python scripts/chat.py outputs/dft "What is the capital of France?"   # one answer
    echo "What is the capital of France?" | python scripts/chat.py outputs/dft --system "Be brief."

The directory holds a whole model, a checkpoint, or an adapter, whose configuration names its base model.
"""

import signal

if __name__ == "__main__":  # the imports below take seconds, in which Ctrl-C would show a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly when the reader does, as in: chat.py … | head

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from transformers import BatchEncoding, GenerationConfig, logging
from transformers.generation.streamers import BaseStreamer

from dft.chat.template import TEMPLATE_ERRORS
from dft.errors import UserError
from dft.files import path_argument
from dft.model.trained import DTYPES, TrainedModel, find_device, load_trained
from dft.printable import printable
from dft.program import program

HELP = "/reset forgets the conversation, /exit or an empty line ends it, Ctrl-C ends an answer."
INTERRUPTED_STATUS = 130


def main(argv: list[str] | None = None) -> None:
    """Answers the prompt of the command line or the pipe, or holds a conversation if there is neither.

    Raises:
        UserError: a flag outside its range, an empty prompt, or a model that can't be loaded.
    """
    args = parse(argv)
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: a flag outside its range.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=path_argument, help="directory of a trained model or adapter")
    parser.add_argument("prompt", nargs="?", help="by default what is piped in, or else a conversation is held")
    parser.add_argument("--system", help="system prompt; a small model needs the one that it was trained with")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer at most; by default 512")
    parser.add_argument("--temperature", type=float, default=0.0, help="by default 0: the likeliest token every time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="by default what the model is saved in")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise UserError("--max_new_tokens must be at least 1, and --temperature at least 0")
    return args


def read_pipe() -> str:
    """Reads the prompt from standard input.

    Raises:
        UserError: it is not text.
    """
    sys.stdin.reconfigure(errors="strict")
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"the piped prompt is not text: {error}") from error


class TokenPrinter(BaseStreamer):
    """Prints the tokens of an answer as they are generated, without special tokens.

    Attributes:
        ids: the tokens of the answer so far.
    """

    def __init__(self, tokenizer):
        self.ids: list[int] = []
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self._is_prompt = True
        # New tokens are decoded together with the last printed ones, because some tokenizers drop a leading blank.
        # These begin at _context, and the new ones at _printed.
        self._context, self._printed = 0, 0

    def put(self, value: torch.Tensor) -> None:
        """Takes new tokens and prints them; the first call brings the prompt, which is not printed."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self._unprinted()
        if not text.endswith("\ufffd"):  # a character may be spread over several tokens
            print(printable(text, lines=True), end="", flush=True)
            self._context, self._printed = self._printed, len(self.ids)

    def end(self) -> None:
        """Prints what is left, and ends the line."""
        print(printable(self._unprinted(), lines=True), flush=True)

    def _unprinted(self) -> str:
        printed = self._decode(self.ids[self._context : self._printed])
        return self._decode(self.ids[self._context :])[len(printed) :]


class Chat:
    """A conversation with a model.

    Args:
        system: system prompt, if any.
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token every time.

    Attributes:
        messages: what was said so far, with the system prompt.
        context: tokens that the model takes.
    """

    def __init__(self, trained: TrainedModel, system: str | None, max_new_tokens: int, temperature: float):
        self.model, self.tokenizer = trained.model, trained.tokenizer
        self.end_tokens = trained.end_tokens
        self.max_new_tokens = max_new_tokens
        self.context = self.model.config.get_text_config().to_dict().get("max_position_embeddings", sys.maxsize)
        self._generation = self._generation_config(temperature)
        self._system_messages = [{"role": "system", "content": system}] if system else []
        self.reset()

    def _generation_config(self, temperature: float) -> GenerationConfig:
        """The model's own settings, with the end of a turn and the temperature that were asked for."""
        config = copy.deepcopy(self.model.generation_config)
        config.update(eos_token_id=self.end_tokens or None, do_sample=temperature > 0, max_length=None)
        if config.pad_token_id is None and self.end_tokens:
            config.pad_token_id = self.end_tokens[0]  # nothing is padded, but transformers warns if it is missing
        if temperature > 0:
            config.temperature = temperature
        else:
            # neutral values, because None would take those that the model brings for sampling
            config.update(temperature=1.0, top_p=1.0, top_k=50)
        return config

    def reset(self) -> None:
        """Forgets everything except the system prompt."""
        self.messages = list(self._system_messages)

    def answer(self, prompt: str) -> str:
        """Prints the model's answer while it is generated, and returns it. Ctrl-C ends it; what came so far is kept.

        Raises:
            KeyboardInterrupt: on Ctrl-C.
            UserError: the conversation is too long for the model or the device, or the chat template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": prompt}]
        inputs = self._tokenize(messages).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        if length >= self.context:
            raise UserError(f"the conversation has {length} tokens, and the model takes {self.context}")
        self._generation.max_new_tokens = min(self.max_new_tokens, self.context - length)
        printer = TokenPrinter(self.tokenizer)
        try:
            self.model.generate(**inputs, generation_config=self._generation, streamer=printer)
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
            is_full = self._generation.max_new_tokens < self.max_new_tokens
            why = f"the model's context of {self.context} tokens is full" if is_full else "see --max_new_tokens"
            print(f"(cut after {len(printer.ids)} tokens: {why})", file=sys.stderr)
        return text

    def _tokenize(self, messages: list[dict[str, str]]) -> BatchEncoding:
        """The conversation up to where the model's answer begins, input_ids and attention_mask [1, T]."""
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        except TEMPLATE_ERRORS as error:
            raise UserError(f"the model's chat template refuses the conversation: {error}") from error


def converse(chat: Chat, ask: Callable[[str], str] = input) -> None:
    """Holds a conversation, until an empty line, /exit, or the end of the input.

    Args:
        ask: called with a prompt to show; returns a line that the user typed.
    """
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
            print(f"({printable(error, lines=True)}; /reset begins a new one)")
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with program():
            main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_STATUS)
