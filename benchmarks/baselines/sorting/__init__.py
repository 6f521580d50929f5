"""The sorting task: small enough that one run takes seconds, so that a grid of hundreds can be measured.

A model of 0.4M parameters reads digits and writes them in some order. It was shown three orders, and GRPO is to elicit
one of them. So the task measures how well an objective amplifies what a model does already, not whether it can learn
anything new.
"""
