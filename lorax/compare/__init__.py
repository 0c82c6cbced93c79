"""How alike two bases are: scores of layers, and the pairing of blocks."""
