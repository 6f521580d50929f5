"""Penstock: asynchronous GRPO as a set of services; this package is what they share."""
