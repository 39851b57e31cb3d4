"""``python -m torch_gradflow``: comparisons, flows and polishing without writing code, on tables of numbers."""
