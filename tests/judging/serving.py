"""Small models whose replies are known, and the server of transformers that serves them over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from examples.make_tiny_model import make_model
from tests.helpers import environment_of, wait_until

TEMPLATE = """\
{%- for message in messages %}
    {%- if 'BREAKS THE TEMPLATE' in message.content %}{{- raise_exception('broken') }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
STEPS = 60


def make_judge(directory: Path, tokenizer: PreTrainedTokenizerFast, reply: str | None) -> Path:
    """A model that was overfitted on one reply, which it gives to every prompt; a random one without a reply.

    The reply is a token of its own, and nothing passes between positions, so that it follows any prompt.
    """
    tokenizer.chat_template = TEMPLATE
    if reply is not None:
        tokenizer.add_tokens(AddedToken(reply, normalized=False))
    model = make_model(len(tokenizer), hidden_size=32, num_layers=1)
    model.config.architectures = [type(model).__name__]
    if reply is not None:
        path = tokenizer("<|im_start|>assistant\n" + reply + "<|im_end|>", return_tensors="pt")["input_ids"][:, -3:]
        torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(STEPS):
            loss = model(input_ids=path, labels=path).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 0.1
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@contextmanager
def served(log: Path) -> Iterator[str]:
    """A server of transformers on a free port; gives its URL, and ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment_of(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _is_ready(url), lambda: server.poll() is not None and log.read_text()[-3000:])
        yield f"{url}/v1"
    finally:
        os.kill(server.pid, signal.SIGKILL)
        server.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=10) as reply:
            return json.load(reply)["status"] == "ok"
    except urllib.error.URLError:
        return False
