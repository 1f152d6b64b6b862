"""Checkpoints as files: loading, tensors, pruning."""
