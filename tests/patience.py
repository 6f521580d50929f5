"""How long a test waits for what must come before it fails.

A test that passes reaches none of these deadlines, so they cost nothing: they are wide enough for a load of ten on two
cores. A deadline that a test wants to be reached is its own, and what makes it pass is a fake that never answers.
"""

ANSWER_SECONDS = 60.0
"""A message, an answer, the end of a task: of something that runs."""

START_SECONDS = 240.0
"""A process or an engine, which imports its libraries first, from its start to what it is to show or to its end."""
