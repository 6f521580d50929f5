"""Who worked when: the trainer's phases, the groups of each server, and the pushes, on one axis of time.

Pure. Owns the order of a step's phases, which follow each other without a gap; what ran in parallel is not among them.
`step` is the number of a step, as people count.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from penstock.contracts import ScoredGroup

PHASES = ("wait", "commit", "take_turn", "update", "leave", "push_wait")


def trainer_bars(step: int, line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The phases of a step's line, from its start on; a phase of no time is none."""
    bars, at = [], float(line["started_at"])
    for phase in PHASES:
        seconds = float(line["seconds"].get(phase, 0.0))
        if seconds > 0:
            bars.append({"step": step, "phase": phase, "start": at, "end": at + seconds})
        at += seconds
    return bars


def push_bars(step: int, line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pushes that ended during a step.

    Lines of an earlier release have only their seconds: the push is drawn where it began at the earliest, at the start
    of the step that it ran beside, and `is_measured` is false.
    """
    seconds = line["seconds"]
    if "pushes" in line:
        return [
            {
                "step": step,
                "version": int(each["version"]),
                "start": float(each["started_at"]),
                "end": float(each["ended_at"]),
                "paused_seconds": float(each["paused_seconds"]),
                "is_measured": True,
            }
            for each in line["pushes"]
        ]
    if not seconds.get("push"):
        return []
    begun = float(line["started_at"]) + float(seconds.get("stage", 0.0))
    return [
        {
            "step": step,
            "version": None,
            "start": begun,
            "end": begun + float(seconds["push"]),
            "paused_seconds": float(seconds.get("push_paused", 0.0)),
            "is_measured": False,
        }
    ]


def server_bars(step: int, groups: Iterable[ScoredGroup]) -> list[dict[str, Any]]:
    """When each group of a step was made, and by which server."""
    return [
        {
            "step": step,
            "group": index,
            "ticket": each.group.ticket.number,
            "server": each.group.server,
            "start": each.group.started_at,
            "end": each.group.ended_at,
        }
        for index, each in enumerate(groups)
    ]
