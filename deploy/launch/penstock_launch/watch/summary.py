"""The end of a run: `summary.json`, and a closing report that a newcomer understands.

Owns the merge of the trainer's facts (`trainer_summary.json`, written at its end) with the launcher's.
Invariant: summary.json is complete or absent, and always states how the launch ended.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from penstock.durable import write_durably
from penstock.records.files import SUMMARY_FILE, TRAINER_SUMMARY_FILE, read_document
from penstock_launch.supervise.supervisor import RunOutcome
from penstock_launch.watch.figures import duration, number

MEGABYTE = 10**6


@dataclass(frozen=True)
class LaunchFacts:
    """The launcher's facts. `started_at`: Unix seconds."""

    started_at: float
    peak_rss_bytes: Mapping[str, int]
    restarts: Mapping[str, int]
    given_up: Mapping[str, str]
    outcome: RunOutcome


def read_trainer_summary(folder: Path) -> dict[str, Any]:
    """The trainer's summary; empty if there is none that can be read."""
    return read_document(folder / TRAINER_SUMMARY_FILE)


def forget_trainer_summary(folder: Path) -> None:
    """Delete the trainer's summary of an earlier launch, so that it is not mistaken for this one's."""
    (folder / TRAINER_SUMMARY_FILE).unlink(missing_ok=True)


def merge(trainer: Mapping[str, Any], facts: LaunchFacts) -> dict[str, Any]:
    """One document of both: all of the trainer's facts, plus the launcher's."""
    started = trainer.get("training_started_at")
    return {
        **trainer,
        "seconds_setup": None if started is None else round(max(0.0, float(started) - facts.started_at), 3),
        "peak_rss_bytes": dict(facts.peak_rss_bytes),
        "restarts": dict(facts.restarts),
        "given_up": dict(facts.given_up),
        "exit": {"code": facts.outcome.exit_code, "reason": facts.outcome.reason, "lines": list(facts.outcome.lines)},
    }


def write_summary(folder: Path, facts: LaunchFacts) -> dict[str, Any]:
    """Merge and write summary.json; returns its content."""
    document = merge(read_trainer_summary(folder), facts)
    data = msgspec.json.format(msgspec.json.encode(document), indent=2)
    write_durably(folder / SUMMARY_FILE, data + b"\n")
    return document


def closing_report(summary: Mapping[str, Any], folder: Path, existing: str) -> list[str]:
    """The closing report, line by line. `existing`: run.existing, which decides how to continue."""
    outcome = summary["exit"]
    lines = [*_samples(summary, "before"), *_samples(summary, "after"), ""]
    if outcome["code"] == 0:
        lines.append(_finished(summary))
    else:
        lines.append(f"Ended with exit code {outcome['code']}: {outcome['reason']}")
        lines.extend(f"    {line}" for line in outcome["lines"])
        if existing == "replace":
            lines.append("  to go on    the same command with --run.existing resume; without it, this run is deleted")
        else:
            lines.append("  to go on    the same command; --run.existing replace deletes this run and begins anew")
    lines.extend(_results(summary))
    lines.append(f"  summary     {folder / SUMMARY_FILE}")
    lines.append(f"  logs        {folder / 'logs'}")
    return lines


def _finished(summary: Mapping[str, Any]) -> str:
    setup = duration(summary.get("seconds_setup"))
    training = duration(summary.get("seconds_training"))
    return f"Finished: {summary.get('steps', '?')} steps in {training} of training, after {setup} of set-up."


def _results(summary: Mapping[str, Any]) -> Iterator[str]:
    start, end = summary.get("heldout_accuracy_start"), summary.get("heldout_accuracy_end")
    if end is not None:
        yield f"  accuracy    {number(start)} before, {number(end)} after{_held_out(summary)}"
    if (rate := summary.get("generation_tokens_per_second")) is not None:
        yield f"  speed       {rate:.0f} tokens/s generated; gap to ideal {number(summary.get('gap_to_ideal'))}"
    if (worst := summary.get("staleness_max")) is not None:
        yield f"  staleness   at most {worst} versions; allowed {summary.get('max_staleness', '?')}"
    if episodes := summary.get("episodes"):
        yield f"  episodes    {_shown_episodes(episodes)}"
    if lost := summary.get("non_finite_steps"):
        yield f"  not finite  loss or gradient of {lost} of {summary.get('steps', '?')} steps (docs/alerts.md)"
    tickets = summary.get("tickets")
    if isinstance(tickets, Mapping):
        yield f"  tickets     {_shown_tickets(tickets)}"
    if any(summary["restarts"].values()):
        shown = ", ".join(f"{name} {count}" for name, count in summary["restarts"].items() if count)
        yield f"  restarts    {shown}"
    for name, reason in summary["given_up"].items():
        yield f"  given up    {name}: {reason}"
    if total := summary["peak_rss_bytes"].get("total"):
        yield f"  memory      {total / MEGABYTE:.0f} MB at the peak, all processes together"


def _held_out(summary: Mapping[str, Any]) -> str:
    """The prompts of the evaluation, in words: whether they were held out was looked at when the run began."""
    trained = summary.get("heldout_prompts_trained")
    if trained == 0:
        return ", on prompts that it never trained on"
    return f"; of its {summary.get('heldout_prompts', '?')} prompts {trained} are training prompts too"


def _shown_episodes(episodes: Mapping[str, float]) -> str:
    branches = sum(value for name, value in episodes.items() if name.startswith("branches_"))
    return (
        f"{number(episodes.get('turns'), 1)} turns, {number(episodes.get('tool_calls'), 1)} tool calls and "
        f"{number(branches, 1)} branches each; {episodes.get('failed_ratio', 0):.1%} failed; "
        f"{episodes.get('cached_tokens_ratio', 0):.0%} of the prompt tokens were cached"
    )


def _shown_tickets(tickets: Mapping[str, Any]) -> str:
    dropped = tickets.get("dropped", {})
    num_dropped = sum(dropped.values()) if isinstance(dropped, Mapping) else dropped
    return (
        f"{tickets.get('issued', '?')} issued = {tickets.get('trained', '?')} trained + {num_dropped} dropped + "
        f"{tickets.get('outstanding', '?')} outstanding"
    )


def _samples(summary: Mapping[str, Any], when: str) -> Iterator[str]:
    samples = summary.get(f"samples_{when}") or []
    if samples:
        yield ""
        yield f"Completions {when} training:"
    for sample in samples:
        prompt = str(sample.get("prompt", "")).splitlines()
        shown = prompt[-1] if prompt else ""
        reward = "failed" if sample.get("reward") is None else f"{sample['reward']:g}"
        completion = str(sample.get("completion", ""))
        yield f"  {shown} -> {completion!r}   expected {str(sample.get('answer', ''))!r}   reward {reward}"
