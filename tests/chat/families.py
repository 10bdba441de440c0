"""Small real tokenizers with the chat templates of well-known model families, and an oracle of their labels.

A template in tests/chat/families/ has the comments {#gen#} and {#endgen#} around the text that the assistant writes.
They are dropped for the code under test, and become {% generation %} tags for transformers' own mask, the oracle.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from examples.make_example_data import dialogues_zh, facts_en, tools_en
from examples.make_tiny_model import strings

DIRECTORY = Path(__file__).parent / "families"
# similar to GPT-4's and Qwen's: line ends join into one word, and to the punctuation before them
BYTE_WORDS = r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LINE_ENDS = ["a.\n\nb", "one\n\n\ntwo", "three\n\n\n\nfour", "x \n\ny", "  indented\n  text"] * 20


@dataclass(frozen=True)
class Family:
    """A template and the tokens of its tokenizer. `special`, `unmarked`, `rstrip`: names separated by spaces."""

    template: str  # file name without .jinja
    special: str  # its control tokens that are marked as special
    eos: str
    unmarked: str = ""  # its control tokens that are not
    bos: str | None = None
    kind: str = "bytes"  # "bytes", "metaspace" or "prepend" (a space is put before every segment)
    added: tuple[str, ...] = ()  # tokens that are plain text
    rstrip: str = ""  # control tokens that swallow the whitespace after them
    opener: str = ""  # the opening of a thinking block at the end of the generation prompt
    reasoning: str = "reasoning_content"  # the key of a message that the template reads

    @property
    def control(self) -> list[str]:
        """All control tokens."""
        return f"{self.special} {self.unmarked}".split()


QWEN = {"special": "<|endoftext|> <|im_start|> <|im_end|>", "eos": "<|im_end|>"}
QWEN_TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
MISTRAL_TOOLS = "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
DEEPSEEK_TOOLS = "outputs▁begin outputs▁end output▁begin output▁end calls▁begin calls▁end call▁begin call▁end sep"
UNMARKED = "<｜User｜> <｜Assistant｜> " + " ".join(f"<｜tool▁{name}｜>" for name in DEEPSEEK_TOOLS.split())
R7B_PARTS = "THINKING ACTION RESPONSE TOOL_RESULT"
DEEPSEEK = {
    "special": "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>",
    "unmarked": UNMARKED,
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "added": ("<think>", "</think>"),
}
PHI3 = {
    "template": "phi3",
    "special": "<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
    "bos": "<s>",
    "eos": "<|endoftext|>",
    "rstrip": "<|system|> <|user|> <|assistant|> <|end|>",
}
GLM = {
    "special": "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
    "eos": "<|endoftext|>",
}
FAMILIES = {
    "qwen2.5": Family("qwen2_5", added=QWEN_TAGS[:2], **QWEN),
    "chatml_unmarked": Family("qwen2_5", "<|endoftext|>", "<|im_end|>", "<|im_start|> <|im_end|>"),
    "qwen3": Family("qwen3", added=QWEN_TAGS, **QWEN),
    "llama3": Family(
        "llama3",
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "mistral_v3": Family(
        "mistral_v3", f"<unk> <s> </s> [INST] [/INST] {MISTRAL_TOOLS}", bos="<s>", eos="</s>", kind="metaspace"
    ),
    "mistral_v11": Family(
        "mistral_v11",
        f"<unk> <s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [ARGS] [THINK] [/THINK] {MISTRAL_TOOLS}",
        bos="<s>",
        eos="</s>",
    ),
    "gemma": Family(
        "gemma",
        "<pad> <eos> <bos> <start_of_turn> <end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        added=("\n\n", "\n\n\n", "  "),
    ),
    "phi3": Family(**PHI3),
    "phi3_prepend": Family(**PHI3, kind="prepend"),
    "phi4": Family("phi4", "<|endoftext|> <|im_start|> <|im_sep|> <|im_end|>", eos="<|im_end|>"),
    "deepseek_v3": Family("deepseek_v3", **DEEPSEEK),
    "deepseek_r1": Family("deepseek_v3", **DEEPSEEK, opener="<think>\\n"),
    "deepseek_v3_1": Family("deepseek_v3_1", **{**DEEPSEEK, "unmarked": re.sub(r"\S*outputs\S* ", "", UNMARKED)}),
    "glm4": Family("glm4", **GLM),
    "glm4_thinking": Family("glm4_thinking", added=QWEN_TAGS, **GLM),
    "gpt_oss": Family(
        "gpt_oss",
        "<|startoftext|> <|endoftext|> <|return|> <|constrain|> <|channel|> <|start|> <|end|> <|message|> <|call|>",
        bos="<|startoftext|>",
        eos="<|return|>",
        reasoning="thinking",
    ),
    "command_r7b": Family(
        "command_r7b",
        "<BOS_TOKEN> "
        + " ".join(f"<|{name}_TOKEN|>" for name in "START_OF_TURN END_OF_TURN SYSTEM USER CHATBOT".split())
        + " "
        + " ".join(f"<|{side}_{name}|>" for side in ("START", "END") for name in R7B_PARTS.split()),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "llama2": Family("llama2", "<unk> <s> </s>", bos="<s>", eos="</s>", kind="prepend"),
    "unknown": Family("unknown", "◁fin▷ ◁ask▷ ◁reply▷ ◁rule▷ ◁got▷ ◁use▷ ◁over▷", eos="◁fin▷"),
}


def template(name: str, tagged: bool = False) -> str:
    """The family's chat template, as it is published or with generation tags."""
    family = FAMILIES[name]
    text = (DIRECTORY / f"{family.template}.jinja").read_text(encoding="utf-8").replace("{#opener#}", family.opener)
    for word in ("gen", "endgen"):
        text = text.replace(f"{{#{word}#}}", f"{{%- {word}eration %}}" if tagged else "")
    return text


def corpus() -> list[str]:
    return [*strings(facts_en()[:30] + dialogues_zh()[:10] + tools_en()[:4]), *LINE_ENDS]


@cache
def byte_level() -> str:
    """A byte-level BPE tokenizer without control tokens, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BYTE_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer.to_str()


@cache
def sentencepiece_like(kind: str) -> str:
    """A BPE tokenizer with ▁ for spaces and bytes for rare characters, without control tokens, as JSON."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    alphabet = ["\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(corpus(), trainer)
    trained = json.loads(words.to_str())["model"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list(trained["vocab"])
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer.to_str()


def tokenizer(name: str, tagged: bool = False) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of the family with its chat template."""
    family = FAMILIES[name]
    backend = Tokenizer.from_str(byte_level() if family.kind == "bytes" else sentencepiece_like(family.kind))
    rstrip = family.rstrip.split()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=token in rstrip) for token in family.special.split()]
    )
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    if family.unmarked:  # as DeepSeek's tokenizers have them
        backend.normalizer = normalizers.Sequence([])
        backend.add_tokens([AddedToken(token, special=False, normalized=True) for token in family.unmarked.split()])
    names = {"bos_token": family.bos} if family.bos else {}
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=family.eos, clean_up_tokenization_spaces=False, **names
    )
    result.chat_template = template(name, tagged)
    return result


@dataclass
class Oracle:
    """The spans and labels of one family's conversations by transformers itself, from the tags in the template."""

    name: str

    def __post_init__(self):
        self.family = FAMILIES[self.name]
        self.tokenizer = tokenizer(self.name, tagged=True)
        self.control_ids = self.tokenizer.convert_tokens_to_ids(self.family.control)

    def spans(self, messages: list[dict], tools: list | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and the characters [start, end) that the assistant writes."""
        texts, spans = render_jinja_template(
            conversations=[self.as_read(messages)],
            tools=tools,
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], spans[0]

    def encode(self, messages: list[dict], tools: list | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels, int [T], by transformers' mask.

        The mask is corrected at the borders of turns: a token that begins in the header belongs to the header, and a
        last character of several tokens is supervised with all of them.
        """
        encoding = self.tokenizer.apply_chat_template(
            self.as_read(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = np.array(encoding["input_ids"]), np.array(encoding["assistant_masks"], dtype=bool)
        starts, ends = np.array(encoding.encodings[0].offsets).T
        for start, end in self.spans(messages, tools)[1]:
            mask[(starts < start) & (start < ends)] = False
            mask[starts == end - 1] = True
        if self.family.template.startswith("glm") and messages[-1]["role"] == "assistant":
            ids, mask = np.append(ids, self.tokenizer.eos_token_id), np.append(mask, True)
        return ids, np.where(mask, ids, -100)

    def spoof(self) -> str:
        """The text of a conversation in the family's own format, with every control token."""
        chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
        text = tokenizer(self.name).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return re.sub("</?think>", "", text) + " ".join(self.family.control)

    def as_read(self, messages: list[dict]) -> list[dict]:
        """The messages with their reasoning under the key that the template reads."""
        names = {"reasoning_content": self.family.reasoning}
        return [{names.get(key, key): value for key, value in message.items()} for message in messages]


def runs(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, labels: np.ndarray) -> list[str]:
    """The text of each run of supervised tokens."""
    mask = np.concatenate([[False], labels != -100, [False]])
    borders = np.flatnonzero(np.diff(mask)).reshape(-1, 2)
    return [tokenizer.decode(ids[start:end]) for start, end in borders]
