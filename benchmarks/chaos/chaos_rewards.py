"""The reward of the chaos runs: a pure function of the text, as slow as a file says.

The pace keeps a run from ending before its last kill.
"""

import time
from pathlib import Path
from typing import Any


def share_of_early_letters(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """Share of the completion's characters that come before `n`."""
    time.sleep(read_pace(Path(metadata["pace_file"])))
    return sum("a" <= each < "n" for each in completion) / max(1, len(completion))


def read_pace(path: Path) -> float:
    """Seconds for one completion; 0 if the file is missing or still being written."""
    try:
        return float(path.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0.0
