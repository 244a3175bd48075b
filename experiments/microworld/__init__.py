"""The embedded model: its text generator, tasks, tokenizer and training."""
