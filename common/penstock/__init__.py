"""Penstock: asynchronous GRPO as a set of services; this package holds the code that they share."""
