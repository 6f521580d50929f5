"""The kit for the first hour on a GPU: checks and measurements in parts that need no network. See the README."""
