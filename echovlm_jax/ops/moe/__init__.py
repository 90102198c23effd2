"""The mixture of routed experts: `routing` chooses them, `dispatch` brings tokens to them."""
