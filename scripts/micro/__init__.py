"""The packaged micro model made from nothing: its tokenizer, its training, its answers."""
