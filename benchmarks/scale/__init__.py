"""A full run with a thousand rollout services on one host: `make scale`, docs/scale.md."""
