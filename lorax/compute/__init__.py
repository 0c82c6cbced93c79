"""How and where to compute, and what is kept of earlier work."""
