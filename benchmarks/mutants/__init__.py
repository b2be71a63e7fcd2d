"""Mutation testing: faults planted one at a time, and the tests that ought to notice."""
