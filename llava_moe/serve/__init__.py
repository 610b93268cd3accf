"""Talking to a checkpoint: the engine, the terminal chat and the browser demo."""
