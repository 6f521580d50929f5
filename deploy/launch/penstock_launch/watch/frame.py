"""The picture that the live view redraws: does it learn, how far is it, is it well, one sample, what is amiss.

Invariant: every line fits the width, and all of them the height; the last ones are left out first. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import set_cell_size
from rich.text import Text

from penstock.contracts.status import StepFigures, TrainerStatus
from penstock.readable import harmless, last_line
from penstock_launch.supervise.child import ChildState
from penstock_launch.watch.figures import (
    ASCII_SPARKS,
    FAILED,
    FAULTS,
    NOT_FINITE,
    SPARKS,
    UNKNOWN,
    dropped_words,
    duration,
    health_of,
    held_out_sets,
    heldout_of,
    heldout_steps_of,
    learning_of,
    number,
    sparkline,
    step_of,
)
from penstock_launch.watch.follow import RunSnapshot, ServiceView
from penstock_launch.watch.news import phase_of
from penstock_launch.watch.step_table import MAX_WIDTH

LABEL_WIDTH = 10
BAR_WIDTH = 20
MAX_SERVICES = 5
ROOM_FOR_KEYS = 2  # a terminal shows ^C where the cursor stands: it must not reach the next line
ELLIPSIS = "..."
BAD, UNSURE, LABEL = "red", "yellow", "dim"
STATE_STYLES = {
    ChildState.READY: "green",
    ChildState.STARTING: UNSURE,
    ChildState.WAITING: BAD,
    ChildState.ENDED: LABEL,
}


@dataclass(frozen=True)
class Screen:
    """Room for the picture. blocks: whether the terminal can show the blocks of a sparkline."""

    width: int
    height: int
    blocks: bool = True

    @property
    def usable_width(self) -> int:
        return max(1, min(self.width, MAX_WIDTH) - ROOM_FOR_KEYS)


def frame(run: str, snapshot: RunSnapshot | None, doing: str, seconds: float, screen: Screen) -> list[Text]:
    """The lines. doing: what the launcher itself does, if the run does nothing beside; seconds: since its start."""
    width = screen.usable_width
    phase = doing or ("starting" if snapshot is None else phase_of(snapshot))
    lines = [Text.assemble((f"penstock {harmless(run)}", "bold"), f"  {phase}  ", (duration(seconds), LABEL))]
    if snapshot is not None:
        if snapshot.status is not None:
            lines += _figures(snapshot.status, screen)
            lines += _dropped(snapshot, width)
        lines += _sample(snapshot, width)
        lines += _services(snapshot.services)
    for line in lines:
        _shorten(line, width)
    return lines[: max(1, screen.height - 1)]  # the cursor stands on the last line


def _figures(status: TrainerStatus, screen: Screen) -> list[Text]:
    width, lines = screen.usable_width, []
    if status.steps:
        lines.append(_reward(status.steps, screen))
    for name, each in held_out_sets(status).items():
        of = [("set", harmless(name))] if name else []
        lines += _flow("held-out", [*of, *heldout_of(each), ("after", heldout_steps_of(each))], width)
    if status.steps:
        lines += _flow("update", learning_of(status), width)
    if status.first_step is not None:
        lines.append(_progress(status))
    if status.steps:
        lines += _flow("health", health_of(status), width)
    if status.waiting_for:
        lines.append(_labelled("waiting", Text(f"for {harmless(status.waiting_for)}", UNSURE)))
    return lines + [_labelled("fenced", Text(f"{name}: {harmless(why)}", BAD)) for name, why in status.fenced.items()]


def _reward(steps: Sequence[StepFigures], screen: Screen) -> Text:
    rewards = [step.reward for step in steps if step.reward is not None]
    shown = f"{number(steps[-1].reward, 3)}  "
    marks = SPARKS if screen.blocks else ASCII_SPARKS
    curve = sparkline(rewards, screen.usable_width - LABEL_WIDTH - len(shown), marks)
    return _labelled("reward", Text.assemble((shown, "bold"), (curve, "green")))


def _progress(status: TrainerStatus) -> Text:
    total = status.total_steps
    full = round(BAR_WIDTH * min(1.0, status.step / total)) if total else 0
    bar = f"[{'=' * full}{' ' * (BAR_WIDTH - full)}]  " if total else ""
    rest = f"  {number(status.step_seconds)} s/step  {duration(status.eta_seconds)} left" if status.steps else ""
    return _labelled("steps", Text.assemble(bar, (step_of(status), "bold"), rest))


def _labelled(label: str, content: Text) -> Text:
    return Text.assemble((f"{label:{LABEL_WIDTH}}", LABEL), content)


def _flow(label: str, pairs: Sequence[tuple[str, str]], width: int) -> list[Text]:
    """Names and values next to each other, on as many lines as they need."""
    lines = [_labelled(label, Text())]
    for name, value in pairs:
        bad = value == NOT_FINITE or (name == FAILED and value not in ("0%", UNKNOWN))
        item = Text.assemble((f"{name} ", LABEL), (value, BAD if bad else ""))
        if lines[-1].cell_len > LABEL_WIDTH and lines[-1].cell_len + item.cell_len > width:
            lines.append(_labelled("", Text()))
        lines[-1].append_text(item).append("   ")
    return lines


def _dropped(snapshot: RunSnapshot, width: int) -> list[Text]:
    """Groups that no step trains, and the reason of the last one whose rewards failed."""
    dropped = {} if snapshot.status is None else snapshot.status.dropped
    if not dropped:
        return []
    failed = any(reason in FAULTS for reason in dropped)
    number_of = sum(dropped.values())
    shown = f"{number_of} group{'' if number_of == 1 else 's'}: {dropped_words(dropped)}"
    lines = [_labelled("dropped", Text(shown, BAD * failed))]
    if snapshot.why_dropped:
        lines.append(_labelled("", Text(_cut(harmless(snapshot.why_dropped), width - LABEL_WIDTH))))
    return lines


def _sample(snapshot: RunSnapshot, width: int) -> list[Text]:
    """One completion on one line, or on two if it is long."""
    sample = snapshot.sample
    if sample is None:
        return []
    reward = f"reward {'failed' if sample.reward is None else f'{sample.reward:g}'}"
    prompt, completion = (
        Text(harmless(sample.asked or last_line(sample.prompt))),
        Text(harmless(repr(sample.completion))),
    )
    room = width - LABEL_WIDTH
    if prompt.cell_len + completion.cell_len + len(f" ->   {reward}") <= room:
        return [_labelled("sample", Text.assemble(prompt, " -> ", completion, "  ", (reward, "bold")))]
    return [
        _labelled("sample", Text(_cut(prompt.plain, room))),
        _labelled("  ->", Text.assemble(_cut(completion.plain, room - len(reward) - 2), "  ", (reward, "bold"))),
    ]


def _shorten(line: Text, width: int) -> None:
    """Cut a line that is too long in place, so that it shows that it is cut."""
    line.rstrip()  # the room behind the last figure
    if line.cell_len > width:
        line.truncate(max(0, width - len(ELLIPSIS)), overflow="crop")
        line.append(ELLIPSIS[:width])


def _cut(text: str, width: int) -> str:
    shown = Text(text)
    if shown.cell_len <= width:
        return text
    return set_cell_size(text, max(0, width - len(ELLIPSIS))) + ELLIPSIS


def _services(services: Sequence[ServiceView]) -> list[Text]:
    """Those that are not ready, in trouble, or were started again."""
    shown = [each for each in services if each.state != ChildState.READY or each.trouble or each.restarts]
    width = max((len(each.name) for each in shown[:MAX_SERVICES]), default=0) + 2
    lines = []
    for each in shown[:MAX_SERVICES]:
        style = UNSURE if each.trouble else STATE_STYLES[ChildState(each.state)]
        again = f"  restarts {each.restarts}" if each.restarts else ""
        detail = harmless(each.trouble or each.detail)
        since = f" ({each.seconds:.0f} s)" if each.state == ChildState.STARTING else ""
        lines.append(Text.assemble((f"{each.name:{max(width, LABEL_WIDTH)}}", LABEL), (each.state, style), again))
        lines[-1].append(f"  {detail}{since}")
    if len(shown) > MAX_SERVICES:
        lines.append(_labelled("", Text(f"and {len(shown) - MAX_SERVICES} more")))
    return lines
