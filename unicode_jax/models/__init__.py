"""The visual tokenizer, the language model and what joins them."""
