"""Measurements of Penstock against other trainers; README.md says how to run them."""
