"""Seeded stand-ins for base models and adapters, and the demonstration that runs on them."""
