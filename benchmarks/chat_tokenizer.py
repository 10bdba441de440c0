"""A tokenizer of 131 072 tokens with ChatML, made of a vocabulary that a package brings along."""

import json
from importlib.util import find_spec
from pathlib import Path

VOCABULARY = "tekken_240911.json"  # in mistral-common, under the Apache license 2.0
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nAnswer briefly and truly.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# the same text, with the assistant's turns between tags
TAGGED_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nAnswer briefly and truly.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def vocabulary_file() -> Path | None:
    """The vocabulary in the installed mistral-common; None if it isn't there."""
    spec = find_spec("mistral_common")
    path = Path(spec.origin).parent / "data" / VOCABULARY if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None


def make_tokenizer(directory: Path) -> None:
    """Writes a fast tokenizer with TEMPLATE to a directory."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral.tokenizer import MistralConverter

    source = vocabulary_file()
    assert source is not None, "mistral-common is not installed"
    data = json.loads(source.read_text(encoding="utf-8"))
    config = data["config"]
    data["vocab"] = data["vocab"][: config["default_vocab_size"] - config["default_num_special_tokens"]]
    data["special_tokens"] = [{"rank": i, "token_str": name} for i, name in enumerate(CONTROL_TOKENS)]
    directory.mkdir(parents=True, exist_ok=True)
    with_names = directory / "vocabulary.json"
    with_names.write_text(json.dumps(data), encoding="utf-8")
    backend = MistralConverter(str(with_names)).converted()
    with_names.unlink()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
