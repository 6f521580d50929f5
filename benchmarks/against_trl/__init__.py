"""The demo against TRL on the same two cores: both sides, their figures and their table. See the README."""
