"""Attacks on the product: mutated files, kills at every write, long runs; alone, and as a part of the tests."""
