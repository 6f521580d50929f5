"""The end of a run as a document: `summary.json`.

Owns the merge of the figures of the run's files, the trainer's facts (`trainer_summary.json`, written at its end) and
the launcher's. Invariant: summary.json is complete or absent, and always states how the launch ended; its figures are
of all lives of the run, whatever ended this one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from penstock.config import Config
from penstock.durable import write_durably
from penstock.errors import DataError
from penstock.records.figures import set_of
from penstock.records.files import FINAL_MODEL, SUMMARY_FILE, TRAINER_SUMMARY_FILE, read_document
from penstock.records.run import RunRecords
from penstock_launch.supervise.supervisor import RunOutcome


@dataclass(frozen=True)
class LaunchFacts:
    """The launcher's facts. `started_at`: Unix seconds."""

    started_at: float
    peak_rss_bytes: Mapping[str, int]
    restarts: Mapping[str, int]
    given_up: Mapping[str, str]
    outcome: RunOutcome
    place: str = ""
    """Where it was launched, `local` or `ray`; empty if a scheduler runs it."""


def forget_trainer_summary(folder: Path) -> None:
    """Delete the trainer's summary of an earlier launch, so that it is not mistaken for this one's."""
    (folder / TRAINER_SUMMARY_FILE).unlink(missing_ok=True)


def make_summary(folder: Path, config: Config, facts: LaunchFacts) -> dict[str, Any]:
    """The figures of the run's files, all of the trainer's facts, and the launcher's."""
    records = RunRecords(folder)
    try:
        figures = records.figures()
        starts = [started_at for line in records.steps() if (started_at := line["started_at"]) >= facts.started_at]
        plan = _plan(records, config, figures["steps"], len(starts))
    except DataError as error:
        figures, starts, plan = {"unreadable": str(error)}, [], {}
    return {
        "model": config.actor.path,
        "max_staleness": config.staleness.max_staleness,
        **figures,
        **plan,
        **_final(records, figures.get("steps"), facts.outcome.exit_code),
        **read_document(folder / TRAINER_SUMMARY_FILE),
        "steps_of_launch": len(starts),
        "seconds_setup": round(min(starts) - facts.started_at, 3) if starts else None,
        "peak_rss_bytes": dict(facts.peak_rss_bytes),
        "restarts": dict(facts.restarts),
        "given_up": dict(facts.given_up),
        **({"place": facts.place} if facts.place else {}),
        "exit": {"code": facts.outcome.exit_code, "reason": facts.outcome.reason, "lines": list(facts.outcome.lines)},
    }


def _plan(records: RunRecords, config: Config, num_steps: int, num_of_launch: int) -> dict[str, Any]:
    """What the configuration asked for: its number of steps, and the evaluations that were not made.

    The final evaluation is due after the last step, others at their steps; those before this launch are past.
    """
    extent, every = records.extent(), config.eval.every_steps
    sets = [each.name for each in config.held_out_sets]
    due = {num_steps} if num_steps and sets else set()
    if due and every:
        due |= {n for n in range(every, num_steps + 1, every) if n > num_steps - num_of_launch}
    return {
        "steps_planned": extent and extent.planned_steps(config.total_train_epochs, config.run.max_steps),
        "batch_size": config.data.batch_size,
        "heldout_missing": sorted(due - _evaluated(records, sets)),
    }


def _evaluated(records: RunRecords, sets: Sequence[str]) -> set[int]:
    """The numbers of steps after which each of these sets was evaluated."""
    found: dict[int, set[str]] = {}
    for line in records.evaluations():
        found.setdefault(line["steps"], set()).add(set_of(line))
    return {steps for steps, names in found.items() if names >= set(sets)}


def _final(records: RunRecords, steps: int | None, code: int | None) -> dict[str, Any]:
    """Of how many steps the model in `final/` is, if there is one: an earlier launch may have written it."""
    if not (records.folder / FINAL_MODEL / "config.json").exists():
        return {}
    known = records.final_steps()
    if known is None and code == 0:  # of an earlier release; a launch that finishes has just written it
        known = steps
    return {"final_steps": known}


def last_summary(records: RunRecords) -> dict[str, Any]:
    """What is known of a run that does not run: the summary of its last launch, with the figures of its files.

    A launch that crashed after that one has left files and no summary.
    """
    written = records.summary()
    try:
        figures = records.figures()
    except DataError as error:
        return {**written, "unreadable": str(error)}
    if figures["steps"] == written.get("steps"):  # then its tickets are the present ones, and it knows more of them
        figures["tickets"] = written.get("tickets", figures["tickets"])
    code = (written.get("exit") or {}).get("code")
    return {**written, **figures, **_final(records, figures["steps"], code)}


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json."""
    data = msgspec.json.format(msgspec.json.encode(summary), indent=2)
    write_durably(folder / SUMMARY_FILE, data + b"\n")
