"""The `penstock` command: starts, watches and ends the services of a run."""
