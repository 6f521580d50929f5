"""The reward service: scores groups of completions with reward functions."""
