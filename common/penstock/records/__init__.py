"""The records of runs: find one, and read what it has written."""

from penstock.records.run import DEFAULT_ROOT, RunRecords, find_run, list_runs, newest_run
from penstock.records.state import RunState

__all__ = ["DEFAULT_ROOT", "RunRecords", "RunState", "find_run", "list_runs", "newest_run"]
