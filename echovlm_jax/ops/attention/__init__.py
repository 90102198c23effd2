"""Attention: `dispatch` chooses `blocks` (any platform), `splash` (TPU) or `triton` (GPU)."""
