"""The figures of a finished run, for `summary.json`: those of its files, and what only its trainer knows.

The launcher adds its own figures: set-up time, peak memory, restarts.
"""

import json
from typing import Any

from penstock.broker.trainer import Counters
from penstock.records.run import RunRecords


def make_summary(
    records: RunRecords, counters: Counters, *, engine: str, model: str, max_staleness: int
) -> dict[str, Any]:
    """JSON-ready figures of the full run, earlier lives of the trainer included."""
    return {
        "engine": engine,
        "model": model,
        "max_staleness": max_staleness,
        **records.figures(),
        "tickets": {
            "issued": counters.issued,
            "trained": counters.trained,
            "dropped": dict(counters.dropped),
            "outstanding": counters.outstanding,
        },
    }


def summary_bytes(summary: dict[str, Any]) -> bytes:
    """The file's content."""
    return json.dumps(summary, indent=2).encode() + b"\n"
