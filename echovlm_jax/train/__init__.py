"""Training: what trains, the loss, the optimizer, and the one step that a run compiles."""
