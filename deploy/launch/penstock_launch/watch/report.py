"""The end of a run in words that a newcomer understands: completions, rewards, what failed, the next commands.

Invariant: it says nothing that the figures do not show. Accuracy is shown only if some reward reached eval.success, and
nothing is called held out that was trained on. Pure.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.readable import cut, differing, harmless
from penstock.records.early_stop import why_stopped_early
from penstock.records.figures import of_set
from penstock.records.files import SUMMARY_FILE
from penstock_launch.watch.figures import dropped_words, duration, heldout_figure, number
from penstock_launch.watch.fold import folded
from penstock_launch.watch.next_commands import shown_commands

MEGABYTE = 10**6
REASON_CHARACTERS = 160  # two lines of a terminal: what another program said is often in the middle
NAME_WIDTH = 11
SAMPLE_INDENT = 6
MOST_MISSING = 3  # evaluations that are named
MORE = ""  # of a line that goes on with the subject of the one above


def closing_report(
    summary: Mapping[str, Any], folder: Path, commands: Sequence[tuple[str, str]], width: int | None = None
) -> list[str]:
    """The closing report, line by line. commands: purpose and words of what can be done next.

    width: columns of the terminal, at which lines are folded; None: they stay whole.
    """
    outcome = summary["exit"]
    lines = [*_samples(summary), ""]
    if outcome["code"] == 0:
        lines.append(_finished(summary))
    else:
        lines.append(f"Ended with exit code {outcome['code']}: {outcome['reason']}")
        lines.extend(f"    {line}" for line in outcome["lines"])
        lines.append(_got(summary))
    lines = [row for line in lines for row in folded(line, width, SAMPLE_INDENT)]
    lines.extend(results(summary, width))
    lines.extend(_line("summary", str(folder / SUMMARY_FILE), width))
    lines.extend(_line("logs", str(folder / "logs"), width))
    if commands:
        lines += ["", "Next:", *shown_commands(commands, width)]
    return lines


def results(summary: Mapping[str, Any], width: int | None = None) -> list[str]:
    """Lines of all figures that the summary has, folded at the width of the terminal."""
    found = [
        *_steps(summary),
        *_rewards(summary),
        *_missing(summary),
        *_failures(summary),
        *_speed(summary),
        *_tickets(summary),
        *_final(summary),
        *_launch(summary),
    ]
    return [row for name, text in found for row in _line(name, text, width)]


def _line(name: str, text: str, width: int | None) -> list[str]:
    return folded(f"  {name:{NAME_WIDTH}} {text}", width, len("  ") + NAME_WIDTH + len(" "))


def _steps(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Why there are fewer steps than the configuration asks for, or none of this launch."""
    steps, planned = summary.get("steps", 0), summary.get("steps_planned")
    if summary.get("exit", {}).get("code") != 0 or planned is None:
        return
    if (early := summary.get("stopped_early")) is not None:
        yield "stopped", why_stopped_early(early)
    elif summary.get("steps_of_launch") == 0:
        yield "this launch", f"trained nothing: its configuration asks for {planned} steps, and {steps} are done"
    elif steps < planned:
        fewer = planned - steps
        batches = "1 batch's" if fewer == 1 else f"{fewer} batches'"
        why = dropped_words((summary.get("tickets") or {}).get("dropped", {}))
        yield "fewer steps", f"{batches} worth of tickets ended without training: {why or 'see the logs'}"


def _finished(summary: Mapping[str, Any]) -> str:
    setup = summary.get("seconds_setup")
    after = f", after {duration(setup)} of set-up" if setup is not None else ""
    return f"Finished: {_trained(summary)}{after}."


def _got(summary: Mapping[str, Any]) -> str:
    return f"It has {_trained(summary)}." if summary.get("steps") else "It has no step."


def _trained(summary: Mapping[str, Any]) -> str:
    steps, launched = summary.get("steps", "?"), summary.get("steps_of_launch")
    earlier = f" ({launched} of them in this launch)" if launched is not None and launched != steps else ""
    planned = summary.get("steps_planned")
    of = f" of {planned}" if planned is not None and isinstance(steps, int) and steps < planned else ""
    shown = f"{steps}{of} step{'' if (planned if of else steps) == 1 else 's'}"
    return f"{shown} in {duration(summary.get('seconds_training'))} of training{earlier}"


def _rewards(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    first, last = summary.get("reward_mean_first"), summary.get("reward_mean_last")
    window = summary.get("reward_window_steps", 0)
    if summary.get("steps") == 1:
        yield "reward", f"{number(last)} in the only step"
    elif first is not None:
        steps, of = (f"{window} steps", f" {window}") if window > 1 else ("step", "")
        yield "reward", f"{number(first)} in the first {steps} of training, {number(last)} in the last{of}"
    if summary.get("heldout_steps_end") is not None:
        yield "held-out", f"reward {_before_and_after(summary, 'reward')}{_held_out(summary)}"
    if summary.get("heldout_accuracy_start") or summary.get("heldout_accuracy_end"):
        success = summary.get("heldout_success")
        meaning = "" if success is None else f": the share with a reward of at least {success:g} (eval.success)"
        yield "accuracy", f"{_before_and_after(summary, 'accuracy')}{meaning}"
    yield from _passes(summary)
    for name in summary.get("heldout_sets") or {}:
        yield from _set(name, of_set(summary, name))
    if left_out := summary.get("prompts_too_long"):
        counts = ", ".join(f"{count:,} in {key}" for key, count in left_out.items())
        yield "left out", f"prompts that are too long (data.too_long): {counts}"
    for name, each in (summary.get("sets") or {}).items():
        dropped = sum(each["dropped"].values())
        groups = each["prompts"] + dropped
        yield (
            f"set {name}",
            f"{each['prompts']:,} prompts trained, reward {number(each['reward_mean'])}; no signal in "
            f"{each['no_signal']:,} of {groups:,} groups",
        )


def _set(name: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A held-out set beside the main one."""
    parts = [f"reward {_before_and_after(figures, 'reward')}"]
    if figures.get("heldout_accuracy_start") or figures.get("heldout_accuracy_end"):
        parts.append(f"accuracy {_before_and_after(figures, 'accuracy')}")
    yield "held-out", f"{name}: {'; '.join(parts)}{_held_out(figures)}"
    yield from ((what, f"{name}: {text}") for what, text in _passes(figures))


def _passes(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """pass@k of the last evaluation, with 95 % intervals, if prompts were sampled several times."""
    passes: Mapping[str, Mapping[str, float]] = summary.get("heldout_pass_at_end") or {}
    if len(passes) > 1:
        shown = (
            f"{k}: {number(at['value'])} ({number(at['low'])} to {number(at['high'])})" for k, at in passes.items()
        )
        yield "pass@k", f"after {summary['heldout_steps_end']} steps, by k {', '.join(shown)}"


def _missing(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Evaluations that were due and were not made: what is shown is older than it seems."""
    missing: Sequence[int] = summary.get("heldout_missing") or ()
    if missing:
        steps = summary.get("steps")
        named = ", ".join(f"after {n} steps{' (the final one)' if n == steps else ''}" for n in missing[-MOST_MISSING:])
        more = f", and {len(missing) - MOST_MISSING} before" if len(missing) > MOST_MISSING else ""
        yield "evaluation", f"not made {named}{more}: the run ended before it was complete"


def _before_and_after(summary: Mapping[str, Any], figure: str) -> str:
    start, end = summary.get("heldout_steps_start"), summary["heldout_steps_end"]
    first, last = (heldout_figure(summary, figure, when) for when in ("start", "end"))
    after = f"after {end} steps"
    if start == end:
        return f"{last} {'before' if end == 0 else after}, and no evaluation {'later' if end == 0 else 'before'}"
    before = "before" if start == 0 else f"after {start} steps"
    return f"{first} {before}, {last} {after}"


def _held_out(summary: Mapping[str, Any]) -> str:
    """The prompts of the evaluation, in words: whether they were held out was looked at when the run began."""
    trained, of = summary.get("heldout_prompts_trained"), summary.get("heldout_prompts", "?")
    if trained is None:
        return f", on {of} prompts"
    if trained == 0:
        return f", on {of} prompts that it never trained on"
    if trained == of:
        return f"; its {of} prompts are training prompts: it says nothing about others"
    return f"; of its {of} prompts {trained} are training prompts too"


def _failures(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    completions, groups = summary.get("completions") or {}, summary.get("groups") or {}
    what = "episodes" if summary.get("episodes") else "completions"
    num, failed = completions.get("num", 0), completions.get("failed", 0)
    if failed:
        yield "no reward", f"{failed:,} of {num:,} {what} ({share(failed, num)})"
        yield from _reasons(summary.get("failures") or {})
    if unscored := summary.get("heldout_failed_end"):
        yield "no reward", f"{unscored} of {summary.get('heldout_prompts', '?')} prompts of the last evaluation"
        yield from _reasons(summary.get("heldout_failures") or {})
    if flat := groups.get("no_signal"):
        part = share(flat, groups["num"])
        yield "no signal", f"{flat:,} of {groups['num']:,} groups ({part}): their rewards were equal, or too few"
    if cut_off := completions.get("truncated"):
        limit = "agent.max_turns or agent.max_tokens" if summary.get("episodes") else "sampling.max_new_tokens"
        yield "cut off", f"{share(cut_off, completions['of_steps'])} of the {what} of all steps, by {limit}"
    if lost := summary.get("non_finite_steps"):
        yield "not finite", f"loss or gradient of {lost} of {summary.get('steps', '?')} steps (docs/alerts.md)"


def _reasons(reasons: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        yield MORE, f"{count} x {cut(reason, REASON_CHARACTERS)}"


def _speed(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if (rate := summary.get("generation_tokens_per_second")) is not None:
        overall = summary.get("tokens_per_second")
        shown = f"{number(overall, 0)} tokens/s, {rate:.0f} while engines generated" if overall else f"{rate:.0f}"
        yield "speed", f"{shown}; gap to ideal {number(summary.get('gap_to_ideal'))}"
    if (worst := summary.get("staleness_max")) is not None:
        allowed = f"; allowed {summary['max_staleness']}" if "max_staleness" in summary else ""
        yield "staleness", f"at most {worst} versions{allowed}"
    if episodes := summary.get("episodes"):
        yield "episodes", _shown_episodes(episodes)


def _shown_episodes(episodes: Mapping[str, float]) -> str:
    branches = sum(value for name, value in episodes.items() if name.startswith("branches_"))
    return (
        f"{number(episodes.get('turns'), 1)} turns, {number(episodes.get('tool_calls'), 1)} tool calls and "
        f"{number(branches, 1)} branches each; {episodes.get('failed_ratio', 0):.1%} failed; "
        f"{episodes.get('cached_tokens_ratio', 0):.0%} of the prompt tokens were cached"
    )


def _tickets(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    tickets = summary.get("tickets")
    if not isinstance(tickets, Mapping) or not summary.get("steps"):
        return
    dropped: Mapping[str, int] = tickets.get("dropped", {})
    why = dropped_words(dropped)
    text = f"{tickets.get('trained', '?')} trained + {sum(dropped.values())} dropped{f' ({why})' if why else ''}"
    if "issued" in tickets:
        text = f"{tickets['issued']} issued = {text} + {tickets['outstanding']} outstanding"
    yield "tickets", text
    yield from _reasons(summary.get("lost_messages") or {})


def _final(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """That the model in final/ is not the newest one, which a checkpoint has."""
    steps = summary.get("steps")
    if "final_steps" not in summary or not steps or summary["final_steps"] == steps:
        return
    of = summary["final_steps"]
    when = f"step {of}" if of is not None else "an earlier launch"
    yield "model", f"final/ is of {when}, and {steps} steps are done"


def _launch(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    restarts: Mapping[str, int] = summary.get("restarts") or {}
    if any(restarts.values()):
        yield "restarts", ", ".join(f"{name} {count}" for name, count in restarts.items() if count)
    for name, reason in (summary.get("given_up") or {}).items():
        yield "given up", f"{name}: {reason}"
    if total := (summary.get("peak_rss_bytes") or {}).get("total"):
        yield "memory", f"{total / MEGABYTE:.0f} MB at the peak of the last launch, all processes together"
    if problem := summary.get("unreadable"):
        yield "figures", f"cannot be read: {problem}"


def share(part: int, of: int) -> str:
    """A share that is not 0 is never shown as 0."""
    found = part / of if of else 0.0
    return f"{found:.0%}" if found >= 0.1 else f"{found:.1%}" if found >= 0.001 or not part else "< 0.1%"


def _samples(summary: Mapping[str, Any]) -> Iterator[str]:
    """The completions of the first and of the last evaluation, each named by its step."""
    before, after = (summary.get(f"samples_{when}") or [] for when in ("before", "after"))
    start, end = (summary.get(f"heldout_steps_{when}") for when in ("start", "end"))
    prompts = [str(sample.get("prompt", "")) for sample in (*before, *after)]
    asked = differing(prompts)
    note = "" if asked == [prompt.strip() for prompt in prompts] else " (the part in which prompts differ)"
    rows = [f"  {_sample(sample, part)}" for sample, part in zip((*before, *after), asked, strict=True)]
    for title, shown in (
        ("before training" if start in (0, None) else f"after {_of_steps(start, summary)}", rows[: len(before)]),
        (f"after {_of_steps(end, summary)}", rows[len(before) :]),
    ):
        if shown:
            yield from ("", f"Completions {title}{note}:", *shown)


def _of_steps(number_of: int | None, summary: Mapping[str, Any]) -> str:
    steps = summary.get("steps")
    return f"{number_of} steps" if number_of == steps else f"{number_of} of {steps} steps"


def _sample(sample: Mapping[str, Any], asked: str) -> str:
    reward = "failed" if sample.get("reward") is None else f"{sample['reward']:g}"
    completion, answer = cut(str(sample.get("completion", ""))), cut(str(sample.get("answer", "")))
    return f"{harmless(cut(asked))} -> {completion!r}   expected {answer!r}   reward {reward}"
