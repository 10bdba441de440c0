"""What tests share: ways to run commands, small rows, and templates."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

ROOT = Path(__file__).parent.parent
TIMEOUT = 1800  # seconds for what takes less than two minutes on two cores: a machine ten times slower passes

# A ChatML template without generation tags, of the kind of Qwen2.5's: a default system prompt, tools, tool results
# inside a user turn
CHATML_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Of the kind of Qwen3's: thinking is kept in the turns after the last question and dropped before it
THINKING_TEMPLATE = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content or '' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""


FULL = Path("/dev/full")  # every write to it fails as on a full disk
needs_full_disk = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def environment_of(**env: object) -> dict[str, str]:
    """The environment of a command that a test starts: this one, with the interpreter's programs first on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **{key: str(value) for key, value in env.items()}}


def run(command: list, *, timeout: int = TIMEOUT, **env: object) -> subprocess.CompletedProcess:
    """Runs a command in the project's directory; the output holds stdout and stderr together."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment_of(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def run_on(processes: int, *command) -> str:
    """Runs a worker on so many processes, and returns its output; the test fails if the worker does."""
    launcher = [sys.executable] if processes == 1 else ["torchrun", "--standalone", "--nproc-per-node", processes]
    result = run([*launcher, *command])
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


@dataclass(frozen=True)
class Outcome:
    """What a program ended with.

    Attributes:
        output: stdout and stderr together.
    """

    status: int
    output: str


def run_programs(commands: dict[str, list], directory: Path) -> dict[str, Outcome]:
    """Runs several command lines of the project's scripts in children of one process, which import the libraries once.

    Args:
        commands: {name: [script, flag, …]}.
        directory: for what passes between the processes.
    """
    directory.mkdir(exist_ok=True)
    worker = [sys.executable, ROOT / "tests" / "launch" / "command_worker.py", directory]
    words = {name: [str(word) for word in command] for name, command in commands.items()}
    subprocess.run(
        worker, cwd=ROOT, env=environment_of(), input=json.dumps(words), text=True, timeout=TIMEOUT, check=True
    )
    return {name: Outcome(**json.loads((directory / f"{name}.json").read_text())) for name in commands}


def wait_until(condition: Callable[[], object], failed: Callable[[], object] = lambda: None) -> None:
    """Waits until a condition holds; the test fails if `failed` says why it can't any more, or after TIMEOUT."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        reason = failed()
        assert not reason, reason
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


def tiny_run(model: Path, data: Path, output_dir: Path) -> list:
    """Flags of train_dft.py for two steps in float32."""
    return [
        *("--model_name_or_path", model, "--data_files", data, "--output_dir", output_dir),
        *("--torch_dtype", "float32", "--max_steps", 2, "--per_device_train_batch_size", 2),
        *("--logging_steps", 1, "--disable_tqdm", "True"),
    ]


def change_of_weights(trainer: Trainer) -> torch.Tensor:
    """Trains, and returns what that adds to the weights, [P].

    With plain SGD this is the gradient. It is not with Adam, whose first steps are the gradient's signs: near zero
    these depend on how the processor rounds.
    """
    before = flat_weights(trainer.model)
    trainer.train()
    return flat_weights(trainer.model) - before


def spoil_gradient(model: torch.nn.Module, is_bad: Callable[[], bool]) -> None:
    """Makes one number of the gradient of the first layer's output infinite whenever `is_bad` says so."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        if not is_bad():
            return None
        gradient = gradient.clone()
        gradient.view(-1)[0] = float("inf")
        return gradient

    def watch(module, inputs, output) -> None:
        if output.requires_grad:
            output.register_hook(spoil)

    model.get_decoder().layers[0].mlp.register_forward_hook(watch)


def flat_weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what was expected."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())


def read_log(output_dir: Path) -> list[dict]:
    """The records of train_log.jsonl."""
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


def rows(count: int, seed: int = 0) -> Dataset:
    """Rows of 4 to 40 tokens, of which the last half is supervised."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for i in range(count):
        ids = torch.randint(3, 300, (4 + 6 * (i % 7),), generator=generator).tolist()
        data.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return Dataset.from_list(data)
