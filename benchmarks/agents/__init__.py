"""What agents cost, and whether their episodes are exact."""
