"""Layers shared by the visual tokenizer and the language model."""
