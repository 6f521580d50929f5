"""Are the log-probabilities of episodes those of the weights that their spans name? Asks transformers, path by path."""
