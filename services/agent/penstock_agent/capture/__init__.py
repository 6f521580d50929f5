"""What an episode is made of: messages, their tokens, and the tree of all that engines were sent and returned.

Owns no I/O but loading a tokenizer. Invariant: the tokens of a sampled turn are never made from text again.
"""
