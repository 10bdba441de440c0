"""Flags of adapters: what they mean, and which of them are refused because they would have no effect."""

import pytest

from dft.config.adapters import AdapterConfig
from dft.errors import UserError


def test_plain_training_has_no_adapters():
    plain = AdapterConfig()
    assert not plain.has_adapters
    assert not plain.is_quantized
    assert plain.facts == plain.shown == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 8}, "--lora_r has no effect without adapters: add --use_peft True"),
        ({"lora_init": "pissa"}, "--lora_init has no effect"),
        ({"use_dora": True}, "--use_dora has no effect"),
        ({"lora_target_modules": ["q_proj"]}, "--lora_target_modules has no effect"),
        ({"adapter": "x", "lora_r": 8}, "--lora_r: the --adapter to go on from brings its own"),
        ({"load_in_4bit": True}, "weights in 4 or 8 bits can't be trained"),
        ({"load_in_8bit": True}, "weights in 4 or 8 bits can't be trained"),
        ({"use_peft": True, "load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        (
            {"use_peft": True, "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
            "--bnb_4bit_quant_type has no effect",
        ),
        ({"use_peft": True, "use_bnb_nested_quant": True}, "--use_bnb_nested_quant has no effect"),
        ({"use_peft": True, "load_in_4bit": True, "lora_init": "pissa"}, "--lora_init pissa changes the weights"),
        ({"use_peft": True, "lora_r": 0}, "--lora_r is 0"),
        ({"use_peft": True, "lora_alpha": -1}, "--lora_alpha -1"),
        ({"use_peft": True, "lora_dropout": 1.0}, "--lora_dropout is 1.0; it must be from 0 to below 1"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(settings, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        AdapterConfig(**settings)


def test_where_training_goes_on_from_is_no_fact_to_compare():
    """A run that is resumed may be told of the adapter, or not."""
    first, other = AdapterConfig(use_peft=True), AdapterConfig(use_peft=True, adapter="x")
    assert first.facts == other.facts
    assert first.facts != AdapterConfig(use_peft=True, lora_r=8).facts
