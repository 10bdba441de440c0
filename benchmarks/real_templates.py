"""Which text is supervised with public chat templates: exact, counted, refused or wrong, for each kind of row.

    python benchmarks/real_templates.py TEMPLATES [TEMPLATES …] [--tokenizers DIR …] [--write NAME]

TEMPLATES are .jinja files, or directories of them, for instance the chat_templates of TRL and of axolotl or the
models/templates of llama.cpp, fetched by whoever runs this: nothing is downloaded. A template gets a small byte-level
tokenizer with the control tokens that stand in it. A directory of --tokenizers holds a tokenizer.json and a
tokenizer_config.json, whose own template is tried with the real vocabulary.

What is right is known in two ways, neither of which asks the code under test:
    prompt   where render(messages[:i], add_generation_prompt=True) is a prefix of the render, turn i begins behind it
    tags     NAME_training.jinja with generation tags, where a directory has it beside NAME.jinja, as TRL's does: it
             is tried without its tags, and turns must be what its tags enclose (its own generation prompt goes first)
The last line is JSON: how many cells of each kind.
"""

import argparse
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from benchmarks.measuring import facts, keep, markdown_table, surroundings
from dft.chat.format import ChatFormat
from dft.chat.template import TEMPLATE_ERRORS, Span
from dft.errors import UserError
from dft.reading.formats import RowReader
from dft.reading.rows import RawRow, RejectedRow, RowError

CONTROL = re.compile(
    r"<\|[\w/▁ -]+\|>|<｜[\w▁/ ]+｜>|<\|[\w\"]+>|<\w+\|>|\[\|\w+\|\]|\[/?[A-Z_]{3,}\]|<(?:start|end)_of_turn>|</?s>|"
    r"<bos>|<eos>"
)
ENDS = (
    "<|im_end|> <｜end▁of▁sentence｜> <end_of_turn> <turn|> <|eot_id|> <|eot|> <|return|> <|END_OF_TURN_TOKEN|> "
    "<|end_of_text|> </s> <|end|>"
).split()
BEGINNINGS = "<s> <bos> <|begin_of_text|> <｜begin▁of▁sentence｜>".split()
GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
MARKS = re.compile("[\ue0f0\ue0f1]")
LEGEND = {
    "=": "exact: an oracle agrees, and all of every turn's text is supervised",
    "c": "exact, and the report counts what the template leaves out or an empty turn",
    "~": "supervised, and no oracle applies",
    "T": "the template itself raises",
    "u": "refused: a turn can't be located, or not all of it is shown",
    "m": "refused: a message is not shown",
    "r": "refused for another reason",
    "X": "wrong",
}


# ---- rows ---------------------------------------------------------------------------------------


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(word: str | None, number: int = 1) -> dict[str, Any]:
    arguments = {} if word is None else {"word": word}
    return {
        "id": f"call0000{number}",
        "type": "function",
        "function": {"name": "look_up", "arguments": arguments},
    }


def result(text: str = "a fruit", number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "name": "look_up", "content": text, "tool_call_id": f"call0000{number}"}


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name != key}


WORD = {"type": "object", "properties": {"word": {"type": "string", "description": "the word"}}, "required": []}
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "Looks a word up", "parameters": WORD},
}
RULES = {"role": "system", "content": "Be brief."}
ASKED, FRUIT = user("Apple?"), assistant("Fruit.")
CALLING = assistant("", tool_calls=[call("apple")])
REASONED = assistant("First.", reasoning_content="Why one.")
KINDS: dict[str, list[dict[str, Any]]] = {
    "plain": [user("What?"), assistant("That.")],
    "system": [RULES, user("What?"), assistant("That.")],
    "empty system": [{"role": "system", "content": ""}, user("What?"), assistant("That.")],
    "turns": [user("One?"), assistant("First."), user("Two?"), assistant("Second.")],
    "empty answer": [user("One?"), assistant(""), user("Two?"), assistant("Second.")],
    "reasoning": [user("What?"), assistant("That.", reasoning_content="Because.")],
    "reasoning twice": [user("One?"), REASONED, user("Two?"), assistant("Second.", reasoning_content="Why two.")],
    "think tags": [user("What?"), assistant("<think>\nBecause.\n</think>\n\nThat.")],
    "prose, </think>": [user("How?"), assistant("End with </think> and go."), user("Then?"), assistant("Done.")],
    "tools unused": [user("What?"), assistant("That.")],
    "tool call": [ASKED, CALLING, result(), FRUIT],
    "call, system": [RULES, ASKED, CALLING, result(), FRUIT],
    "call last": [ASKED, CALLING],
    "call and text": [ASKED, assistant("Looking.", tool_calls=[call("apple")]), result(), FRUIT],
    "two calls": [ASKED, assistant("", tool_calls=[call("apple"), call("pear", 2)]), result(), result("b", 2), FRUIT],
    "no arguments": [ASKED, assistant("", tool_calls=[call(None)]), result(), FRUIT],
    "calls in a row": [ASKED, CALLING, result(), assistant("", tool_calls=[call("pear", 2)]), result("b", 2), FRUIT],
    "call without id": [
        ASKED,
        assistant("", tool_calls=[without(call("apple"), "id")]),
        without(result(), "tool_call_id"),
        FRUIT,
    ],
    "call, reasoning": [ASKED, assistant("", tool_calls=[call("apple")], reasoning_content="Why."), result(), FRUIT],
    "space after result": [ASKED, CALLING, result(), assistant("\n Fruit.")],
    "think after result": [ASKED, CALLING, result(), assistant("<think>\nHm.\n</think>\n\nFruit.")],
}
FOREIGN = ("What?", "One?", "Two?", "How?", "Then?", "Apple?", "a fruit", "Be brief")  # no turn may have these


# ---- templates and tokenizers -------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """One template to try: its text, and its text with generation tags, if there is one."""

    name: str
    text: str
    tagged: str | None
    tokenizer: PreTrainedTokenizerBase


def templates(paths: list[Path], tokenizers: list[Path]) -> Iterator[Template]:
    """The templates of files, and those of real tokenizers."""
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*.jinja")):
            text = file.read_text("utf-8")
            tagged = text if GENERATION_TAGS.search(text) else None
            text = GENERATION_TAGS.sub(lambda tag: untagged(tag[0]), text)
            yield Template(f"{file.parent.name}/{file.stem}", text, tagged, small_tokenizer(text))
    for path in tokenizers:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.chat_template is not None:
            yield Template(f"{path.name}, its tokenizer", tokenizer.chat_template, None, tokenizer)


def untagged(tag: str) -> str:
    """Another block in the place of a generation tag, which leaves the text as it is."""
    return tag.replace("endgeneration", "endif").replace("generation", "if true")


def small_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose control tokens are those that stand in the template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    composed = {"<|user|>", "<|assistant|>", "<|system|>"} if "'<|' + " in template else set()
    control = sorted({*CONTROL.findall(template), *composed, "<|endoftext|>"})
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    eos = next((end for end in ENDS if end in control), "<|endoftext|>")
    bos = next((name for name in BEGINNINGS if name in control), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token="<|endoftext|>")


# ---- what is right ------------------------------------------------------------------------------


def render(template: Template, text: str, messages: list, tools: list | None, **more: bool) -> tuple[str, list[Span]]:
    """A conversation as transformers renders it, and what its tags enclose."""
    texts, spans = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=text, **more, **template.tokenizer.special_tokens_map
    )
    return texts[0], spans[0] if spans else []


def header_of(template: Template) -> str:
    """What the generation prompt adds to a question, without a thinking block."""
    try:
        plain, _ = render(template, template.text, [user("q")], None)
        prompted, _ = render(template, template.text, [user("q")], None, add_generation_prompt=True)
    except TEMPLATE_ERRORS:
        return ""
    return prompted.removeprefix(plain).partition("<think>")[0]


def start_by_prompt(template: Template, text: str, messages: list, tools: list | None) -> int | None:
    """Where the turn after the messages begins, if the render `text` begins with its generation prompt."""
    try:
        prompt, _ = render(template, template.text, messages, tools, add_generation_prompt=True)
    except TEMPLATE_ERRORS:
        return None
    return len(prompt) if prompt and text.startswith(prompt) else None


def joined(text: str, tagged: list[Span]) -> list[Span]:
    """Pairs of tags that follow each other directly are one turn."""
    spans: list[Span] = []
    for start, end in tagged:
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, end))
    return spans


def starts(template: Template, text: str, messages: list[dict], tools: list | None) -> list[set[int]]:
    """Where each turn may begin, by each oracle that applies."""
    numbers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    found: list[set[int]] = [set() for _ in numbers]
    header = header_of(template)
    if template.tagged is not None:
        shown, tagged = render(template, template.tagged, messages, tools, return_assistant_tokens_mask=True)
        tagged = joined(shown, tagged)
        if shown == text and len(tagged) == len(numbers):
            for places, (start, _) in zip(found, tagged, strict=True):
                places.add(start + len(header) * shown.startswith(header, start))  # some tags enclose it
    for places, number in zip(found, numbers, strict=True):
        start = start_by_prompt(template, text, messages[:number], tools)
        if start is not None:
            places.clear()
            places.add(start + len(header) * text.startswith(header, start))  # DeepSeek's after a tool's result
    return found


def judge(template: Template, kind: str) -> tuple[str, str]:
    """The cell of one template and one kind of row, and what is to be said of it."""
    row = {"messages": KINDS[kind]}
    if "call" in kind or "result" in kind or "tools" in kind or "arguments" in kind:
        row["tools"] = [TOOL]
    conversation = RowReader("row.jsonl", "messages", {}).read(RawRow(1, json.dumps(row)))
    if isinstance(conversation, RejectedRow):
        return "r", conversation.detail
    template.tokenizer.chat_template = template.text
    chat_format = ChatFormat(template.tokenizer)
    messages, tools = conversation.messages, conversation.tools
    (example,) = chat_format.encode_batch([(messages, tools, None)])
    if isinstance(example, RowError):
        cells = {"template_error": "T", "unverified_mask": "u", "no_end_of_turn": "u", "message_not_rendered": "m"}
        return cells.get(example.reason, "r"), example.detail
    rendering = chat_format.render(messages, tools)
    text, spans = rendering.text, rendering.spans
    supervised = [text[start:end] for start, end in spans]
    for turn, shown in zip((m for m in messages if m["role"] == "assistant"), supervised, strict=True):
        foreign = [word for word in FOREIGN if word in shown]
        if foreign:
            return "X", f"{foreign} supervised in {shown!r}"
        lost = [part for part in parts(turn) if part not in shown]
        if lost and not example.remarks:
            return "X", f"{lost} is not in {shown!r}, uncounted"
    cell = "c" if example.remarks else "="
    for (start, _), places in zip(spans, starts(template, text, rendering.messages, tools), strict=True):
        if not places:
            cell = "~"
        elif start not in places:
            return "X", f"a turn begins at {text[start : start + 30]!r} and not {text[min(places) :][:30]!r}"
    return cell, ""


def parts(turn: dict[str, Any]) -> list[str]:
    """The texts that the assistant wrote in a turn, without tags."""
    calls = [c["function"] for c in turn.get("tool_calls", ())]
    words = [*re.split("</?think>", turn["content"]), turn.get("reasoning_content", "")]
    words += [name for c in calls for name in (c["name"], *c["arguments"].values())]
    return [word.strip() for word in words if word.strip()]


def try_all(found: list[Template]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The lines of the table, and a remark for each cell that needs one."""
    lines: list[tuple[str, ...]] = []
    remarks: list[str] = []
    for template in found:
        cells = []
        for kind in KINDS:
            try:
                cell, remark = judge(template, kind)
            except UserError as error:  # of the template itself
                cell, remark = "T", str(error)
            cells.append(cell)
            remarks += [f"{template.name}, {kind}: {cell} {remark}"] if remark else []
        lines.append((template.name, *cells))
    return lines, remarks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", nargs="*", type=Path)
    parser.add_argument("--tokenizers", nargs="*", type=Path, default=[])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/real_templates.md and .json")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    lines, remarks = try_all(list(templates(args.templates, args.tokenizers)))
    counts = dict(Counter(cell for line in lines for cell in line[1:]).most_common())
    about = surroundings(["transformers", "tokenizers"])
    about["command"] = "python benchmarks/real_templates.py TEMPLATES --tokenizers TOKENIZERS --write"
    legend = "\n".join(f"- `{cell}` {text}: {counts.get(cell, 0)}" for cell, text in LEGEND.items())
    kinds = ", ".join(f"{i} {kind}" for i, kind in enumerate(KINDS, 1))
    table = markdown_table([("template", *(str(i) for i in range(1, len(KINDS) + 1))), *lines])
    text = "\n\n".join(["# Public chat templates: results", facts(about), legend, f"Kinds of rows: {kinds}.", table])
    print(text, *remarks, sep="\n")
    if args.write:
        keep("real_templates", text, about | {"counts": counts, "cells": lines})
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
