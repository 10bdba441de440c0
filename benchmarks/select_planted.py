"""Rows with planted faults for benchmarks/select_model.py: facts in many wordings, and a model that learns them.

The model sees half of the rows. In the other half, whose wordings it hasn't seen with these facts, some rows get the
answer of another one.
"""

from pathlib import Path

import numpy as np
import torch

from dft.batching.collators import FlatteningCollator
from dft.batching.varlen_attention import VARLEN, register
from dft.chat.format import ChatFormat
from dft.reading.rows import Conversation
from examples.make_example_data import ANTONYMS_ZH, CAPITALS, CAPITALS_ZH, ELEMENTS
from examples.make_tiny_model import make_model, make_tokenizer

OPENINGS = ("", "Hello! ", "One more: ", "Quickly. ")  # of each question
WORDINGS = 40  # of each question, with its openings
RATE = 2e-3
SUBJECTS = {  # of what is asked: the facts, wordings of the question, wordings of the answer
    "capitals": (
        CAPITALS,
        ("What is the capital of {0}?", "Name the capital city of {0}.", "{0}: what is its capital?",
         "Capital of {0}?", "Which city is the capital of {0}?", "Tell me the capital of {0}, please.",
         "I need the capital of {0}.", "Where does the government of {0} sit?", "{0}. Its capital, please!",
         "Do you know the capital of {0}?"),
        ("The capital of {0} is {1}.", "{1} is the capital of {0}.", "It is {1}."),
    ),
    "elements": (
        ELEMENTS,
        ("What is the chemical symbol of {0}?", "How is {0} written in formulas?", "Symbol of {0}?",
         "Give me the symbol of {0}.", "{0}: which symbol?", "Which symbol has {0}?", "I forgot the symbol of {0}.",
         "In the periodic table, what stands for {0}?", "Please abbreviate {0}.", "The symbol for {0}, please."),
        ("The symbol of {0} is {1}.", "{1} is the symbol of {0}.", "It is {1}."),
    ),
    "antonyms": (
        ANTONYMS_ZH,
        ("“{0}”的反义词是什么？", "请说出“{0}”的反义词。", "“{0}”反过来怎么说？", "与“{0}”相反的词是？",
         "“{0}”的反面是哪个字？", "我想知道“{0}”的反义词。", "什么字和“{0}”相反？", "反义词：{0}？",
         "“{0}”对应的反义词呢？", "给出“{0}”的反义词。"),
        ("“{0}”的反义词是“{1}”。", "是“{1}”，它和“{0}”相反。", "“{1}”。"),
    ),
    "capitals_zh": (
        CAPITALS_ZH,
        ("{0}的首都是哪里？", "请问{0}的首都叫什么？", "哪座城市是{0}的首都？", "说出{0}的首都。", "{0}首都？",
         "我想知道{0}的首都。", "{0}的政府在哪座城市？", "告诉我{0}的首都。", "首都：{0}？", "你知道{0}的首都吗？"),
        ("{0}的首都是{1}。", "{1}是{0}的首都。", "是{1}。"),
    ),
}  # fmt: skip


def make_rows(seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """All facts in all wordings of the question, each of which has one of the answer, in two halves."""
    rows = []
    for facts, questions, answers in SUBJECTS.values():
        for fact in facts.items():
            for number, question in enumerate(questions):
                answer = answers[number % len(answers)].format(*fact)
                for opening in OPENINGS:
                    rows.append(conversation(opening + question.format(*fact), answer, len(rows)))
    order = np.random.default_rng(seed).permutation(len(rows))
    half = len(rows) // 2
    return [rows[i] for i in order[:half]], [rows[i] for i in order[half:]]


def conversation(question: str, answer: str, line: int) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, None, None, "planted", line + 1, "")


def with_swapped_answers(rows: list[Conversation], share: float, seed: int) -> tuple[list[Conversation], np.ndarray]:
    """The rows, of which a share gets the answer of a row that asks for another fact; and which, int64."""
    rng = np.random.default_rng(seed)
    planted = rng.permutation(len(rows))[: round(share * len(rows))]
    changed = list(rows)
    for index in planted.tolist():
        row = rows[index]
        others = [other for other in rows if (other.line - 1) // WORDINGS != (row.line - 1) // WORDINGS]
        answer = others[rng.integers(len(others))].messages[1]["content"]
        changed[index] = conversation(row.messages[0]["content"], answer, row.line - 1)
    return changed, planted


def train(rows: list[Conversation], epochs: int, directory: Path) -> None:
    """Writes a small model that has been trained on rows for some epochs, in batches of 32, and its tokenizer."""
    corpus = (message["content"] for row in rows for message in row.messages)
    tokenizer = make_tokenizer(corpus, vocab_size=1000)
    model = make_model(1000, hidden_size=96, num_layers=2)
    register()
    model.set_attn_implementation(VARLEN)
    examples = ChatFormat(tokenizer).encode_batch((row.messages, None, None) for row in rows)
    items = [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]
    collator, rng = FlatteningCollator(), np.random.default_rng(0)
    batches = -(-len(items) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * batches)
    for _ in range(epochs):
        for chosen in np.array_split(rng.permutation(len(items)), batches):
            model(**collator([items[i] for i in chosen])).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
