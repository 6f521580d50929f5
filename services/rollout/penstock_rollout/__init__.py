"""The rollout service: takes tickets, generates groups of completions with an inference engine, hands them over."""
