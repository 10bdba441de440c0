"""Answers to many prompts: batches of generate_answers beside model.generate called with one prompt after the other.

    python benchmarks/generation.py                  # a small model; writes results/generation_cpu.md and .json
    python benchmarks/generation.py --device cuda    # Qwen3-0.6B's shapes in bf16
    python benchmarks/generation.py --quick          # fewer prompts, under 2 minutes on 2 cores, writes nothing

Weights are random and nothing ends an answer, so that all answers have the same number of tokens: what is measured is
the work of a token. Prompts are as long as short questions and long ones, 10 to 400 tokens. Both ways search greedily
with a cache of keys and values. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.measuring import facts, keep, markdown_table, surroundings, wait_until_quiet
from benchmarks.train_step_run import SIZES, make_tokenizer
from dft.generation import TOKENS_AT_ONCE, generate_answers

PACKAGES = ("torch", "transformers")
SMALL = {
    "vocab_size": 16000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


def make_model(device: str) -> PreTrainedModel:
    """A model with random weights, in bf16 on a GPU."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**(SMALL if device == "cpu" else SIZES["0.6b"])))
    return model.eval() if device == "cpu" else model.eval().to(torch.bfloat16)


def make_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Random ids; the lengths are log-normal with a median of 60."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.1, 0.8, count), 10, 400).astype(int)
    return [rng.integers(3, vocabulary, length).tolist() for length in lengths]


def seconds(work: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row_by_row(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What a plain loop over model.generate answers."""
    config = GenerationConfig(max_new_tokens=new_tokens, pad_token_id=0)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers.append(found[0, len(prompt) :].tolist())
    return answers


def measure(device: str, count: int, alone: int, new_tokens: int, tokens_at_once: int) -> dict[str, Any]:
    """Tokens a second of both ways; the plain loop answers only the first `alone` prompts."""
    model = make_model(device)
    prompts = make_prompts(count, model.config.vocab_size)
    tokenizer = make_tokenizer()

    def batched(some: list[list[int]]) -> list[list[int]]:
        return generate_answers(model, tokenizer, some, new_tokens, tokens_at_once, end_tokens=[])

    batched(prompts[:2])  # the first calls are not measured
    row_by_row(model, prompts[:1], new_tokens)
    ours = seconds(lambda: batched(prompts), device)
    theirs = seconds(lambda: row_by_row(model, prompts[:alone], new_tokens), device)
    return {
        "prompts": count,
        "prompts_alone": alone,
        "new_tokens": new_tokens,
        "tokens_at_once": tokens_at_once,
        "batched": count * new_tokens / ours,
        "row_by_row": alone * new_tokens / theirs,
    }


def describe(found: dict[str, Any], about: dict[str, Any], device: str) -> str:
    model = "a model of 4 layers and width 128, float32" if device == "cpu" else "Qwen3-0.6B's shapes, bf16"
    lines = [("", "prompts", "new tokens a second", "ratio")]
    lines.append(
        ("model.generate, one after the other", str(found["prompts_alone"]), f"{found['row_by_row']:,.0f}", "")
    )
    ratio = found["batched"] / found["row_by_row"]
    lines.append(("generate_answers", str(found["prompts"]), f"{found['batched']:,.0f}", f"{ratio:.1f}"))
    return "\n\n".join(
        [
            f"# Answers to many prompts, {'on a CPU' if device == 'cpu' else 'on a GPU'}: results",
            facts(about),
            f"{model}, random weights; {found['new_tokens']} new tokens an answer, at most "
            f"{found['tokens_at_once']:,} tokens of prompts and answers at once.",
            markdown_table(lines),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer prompts, no results written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--alone", type=int, default=16, help="prompts of the plain loop")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--tokens_at_once", type=int, default=TOKENS_AT_ONCE)
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.alone, args.new_tokens, args.patience = 32, 4, 32, 2
    wait_until_quiet(args.patience)
    found = measure(args.device, args.prompts, args.alone, args.new_tokens, args.tokens_at_once)
    about = surroundings(PACKAGES)
    text = describe(found, about, args.device)
    print(text)
    ratios = {"batched_vs_row_by_row": round(found["batched"] / found["row_by_row"], 2)}
    if not args.quick:
        keep(f"generation_{args.device}", text, about | {"ratios": ratios, "found": found})
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
