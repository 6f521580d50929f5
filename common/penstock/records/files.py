"""The names of the files of a run that are read from outside, and how a file of one document is read.

docs/protocol.md has the complete list, with who writes what.
"""

from pathlib import Path
from typing import Any

import msgspec

CONFIG_FILE = "config.yaml"
STEPS_FILE = "steps.jsonl"
STEPS_READ_FILE = "steps_read.json"  # what the trainer knows of the lines so far
EVALUATIONS_FILE = "evals.jsonl"
COMPLETIONS_FILE = "samples.jsonl"
DROPPED_FILE = "dropped.jsonl"
DEAD_FILE = "dead.jsonl"
PROCESSES_FILE = "processes.json"
TRAINER_SUMMARY_FILE = "trainer_summary.json"
SUMMARY_FILE = "summary.json"  # written by each launch that ends in order
FINAL_MODEL = "final"  # a folder: the trained model as from_pretrained loads it
TRAINED_FILE = "trained.json"  # in it, and in what is exported: of how many steps the model is
STEP_FILES = "steps"  # a folder, which the trainer makes first
LEDGER_FILE = "ledger.jsonl"  # in it: the journal
ARCHIVE_FILE = "archive.jsonl"  # in it: the ledger's oldest records
MARKS_OF_A_RUN = (CONFIG_FILE, PROCESSES_FILE, STEP_FILES, STEPS_FILE, EVALUATIONS_FILE)


def read_document(path: Path) -> dict[str, Any]:
    """The JSON document of a file; empty if there is none that can be read, since a crash may have cut it off."""
    try:
        document = msgspec.json.decode(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, msgspec.DecodeError):
        return {}
    return document if isinstance(document, dict) else {}
