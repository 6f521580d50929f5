"""The calculator: an environment with a tool, in which an answer takes two turns."""
