"""How well a model answers: metrics with intervals, the harness, comparisons, the HTML report."""
