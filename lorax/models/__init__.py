"""Base models: their families, their layers by name, and their weights, one at a time."""
