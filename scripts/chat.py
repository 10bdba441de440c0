"""Talk to a model that was trained here.

python scripts/chat.py outputs/quickstart/model "What is the capital of France?"   # one answer
python scripts/chat.py outputs/quickstart/model                                    # a conversation
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a trained model")
    parser.add_argument("prompt", nargs="?", help="what to say; without it, a conversation until an empty line")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the likeliest token every time")
    args = parser.parse_args()
    if not (Path(args.model) / "config.json").is_file():
        print(f"error: {args.model} is not a model directory (no config.json in it)", file=sys.stderr)
        sys.exit(2)

    logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device).eval()
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    # a base model's own end token is often not the one that turns were trained to end with
    own = model.generation_config.eos_token_id
    ends = {
        *(own if isinstance(own, list) else [own]),
        tokenizer.eos_token_id,
        tokenizer.get_vocab().get("<|im_end|>"),
    }
    sampling["eos_token_id"] = sorted(ends - {None})
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = [{"role": "system", "content": args.system}] if args.system else []

    while True:
        said = args.prompt or ask()
        if not said:
            return
        messages.append({"role": "user", "content": said})
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").to(device)
        with torch.no_grad():
            output = model.generate(**inputs, streamer=streamer, max_new_tokens=args.max_new_tokens, **sampling)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        if args.prompt:
            return


def ask() -> str:
    """One line from the user; empty at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
