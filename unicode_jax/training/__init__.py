"""Losses, optimizers, state, checkpoints, metrics and the loop."""
