"""Rows of four kinds of answers, and a model that was trained on them until it answers each as it was taught."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dft.batching.collators import PaddingCollator
from dft.chat.format import ChatFormat
from examples.make_tiny_model import make_model


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


ANSWERS = [  # (channel, question, answer)
    ("facts", "Capital of France?", "Paris."),
    ("facts", "Capital of Spain?", "Madrid."),
    ("sums", "2 + 3?", "2 + 3 = 5"),
    ("sums", "4 + 4?", "4 + 4 = 8"),
    ("forms", "Form for Ann", '{"name": "Ann"}'),
    ("forms", "Form for Bob", '{"name": "Bob"}'),
    ("tools", "Weather in Bonn?", call("weather", city="Bonn")),
    ("tools", "Time in Rome?", call("clock", city="Rome", exact=True)),
]
SCORERS = {"facts": "exact", "sums": "last_number", "forms": "json", "tools": "tool_call"}


def conversation(channel: str, question: str, answer: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    return {"messages": [{"role": "user", "content": question}, answer], "channel": channel}


ROWS = [conversation(*lesson) for lesson in ANSWERS]
# each has the answer of the other row of its channel
WRONG_ROWS = [conversation(channel, question, ANSWERS[i ^ 1][2]) for i, (channel, question, _) in enumerate(ANSWERS)]


def teach(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small model that has learnt ROWS by heart."""
    chat_format = ChatFormat(tokenizer)
    examples = [chat_format.encode(row["messages"]) for row in ROWS]
    rows = [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples]
    batch = PaddingCollator(tokenizer)(rows)
    model = make_model(len(tokenizer), hidden_size=32, num_layers=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.tensor(torch.inf)
    for _ in range(400):
        loss = model(**batch).loss
        if loss < 3e-3:
            return model.eval()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"not learnt: {loss}")


def save_taught(tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    tokenizer.save_pretrained(directory)
    teach(tokenizer).save_pretrained(directory)
    return directory
