"""Sizes that a model's configuration implies."""

from transformers import PretrainedConfig


def head_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """Dimensions of a head's keys, and of its values."""
    if getattr(config, "qk_nope_head_dim", None):  # DeepSeek's latent attention
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size, size
