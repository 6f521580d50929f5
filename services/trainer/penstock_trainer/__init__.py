"""The trainer service: issues tickets, trains, publishes weights, keeps checkpoints."""
