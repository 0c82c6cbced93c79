"""Moving an adapter from its source base to a target base."""
