"""Configuration, tokenizer and weights of a model."""
