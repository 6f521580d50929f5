"""The rollout service: takes tickets, generates groups of completions with SGLang, hands them over."""
