"""The agent service: runs agents and environments, and records what the model samples for them, token by token."""
