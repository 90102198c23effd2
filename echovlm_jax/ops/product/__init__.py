"""The one place where weights are multiplied: `einsum`, `grouped` for experts, `weight.lookup`."""
