"""The figures of a finished run, for `summary.json`: those of its files, and what only its trainer knows.

The launcher adds its own figures: set-up time, peak memory, restarts.
"""

import json
from collections.abc import Mapping
from typing import Any

from penstock.broker.trainer import Counters
from penstock.records.run import RunRecords


def make_summary(
    records: RunRecords,
    counters: Counters,
    *,
    engine: str,
    model: str,
    max_staleness: int,
    too_long: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """JSON-ready figures of the full run, earlier lives of the trainer included.

    too_long: by key, the prompts that were left out; absent if none was.
    """
    return {
        "engine": engine,
        "model": model,
        "max_staleness": max_staleness,
        **records.figures(),
        **({"prompts_too_long": dict(too_long)} if too_long else {}),
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
