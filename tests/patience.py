"""How long a test waits for something that must happen, before it fails.

A passing test reaches none of these deadlines, so they cost nothing; they are wide enough for a load of ten on two
cores. If a test wants a deadline to pass, it sets its own, and uses a fake that never answers.
"""

ANSWER_SECONDS = 60.0
"""A message, an answer, the end of a task: of something that runs."""

START_SECONDS = 240.0
"""A process or an engine, which imports its libraries first, from its start to what it is to show or to its end."""
