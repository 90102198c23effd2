"""Ours against PyTorch on this machine's processor: a training step, and an answer."""
