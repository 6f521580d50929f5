"""Makes docs/pictures/terminal.svg from a run's folder: what a terminal showed after some of its steps.

    make demo
    python -m docs.terminal_picture runs/demo --steps 30

The figures are those that the run recorded; they go through the trainer's status and the launcher's view, as in the
run, onto the screen of an emulated terminal. Needs the extra `dev`.
"""

import argparse
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyte
from rich.console import Console
from rich.text import Text

from penstock.config.load import load_config
from penstock_launch.watch.follow import RunSnapshot
from penstock_launch.watch.sample import NewestSample
from penstock_launch.watch.view import LiveView
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.status import TRAINING, Status

PICTURE = Path(__file__).parent / "pictures" / "terminal.svg"
COLUMNS, LINES = 104, 24
WEB_FONTS = re.compile(r"@font-face {.*?}\s*", re.DOTALL)  # the picture loads nothing from elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that has finished")
    parser.add_argument("--steps", type=int, default=30, help="steps after which the picture is taken")
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(drawn(shown(arguments.run, arguments.steps)))


def shown(run: Path, num_steps: int) -> list[Text]:
    """The rows of the terminal after so many steps of a run."""
    now = [0.0]
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, color_system="standard", width=COLUMNS, height=LINES, legacy_windows=False
    )
    setup = float(json.loads((run / "summary.json").read_bytes())["seconds_setup"])
    view = LiveView(run.name, console, lambda: now[0])
    with TemporaryDirectory() as folder:
        status = begun(run, Path(folder))
        evals = list(Progress(run).evals())
        lines = list(Progress(run).step_lines())[:num_steps]
        for line in lines:
            now[0] = setup + line.ended_at - lines[0].started_at
            status.progress.add_step(line)
            status.steps = line.step + 1
            add_evals(Path(folder), evals, line.step)
            status.progress = Progress(Path(folder))
            view.show(RunSnapshot((), status.shown(), sample=NewestSample(Path(folder)).read()))
    return rows_of(out.getvalue())


def begun(run: Path, folder: Path) -> Status:
    """The status of the run's trainer before its first step, with files of its own."""
    config = load_config(["--config", str(run / "config.yaml")])
    return Status(
        config.run.name,
        config.staleness.max_staleness,
        config.data.batch_size,
        num_prompts=1,
        total_steps=sum(1 for _ in Progress(run).step_lines()),
        progress=Progress(folder),
        work=TRAINING,
        first_step=0,
    )


def add_evals(folder: Path, evals: Sequence[Mapping[str, Any]], step: int) -> None:
    """Write those evaluations that had been asked for before a step began: each ends within about a step."""
    ended = [each for each in evals if each["steps"] <= step]
    (folder / "evals.jsonl").write_text("".join(json.dumps(each) + "\n" for each in ended))


def rows_of(output: str) -> list[Text]:
    """The screen of a terminal after this output, with its colours."""
    screen = pyte.Screen(COLUMNS, LINES)
    pyte.Stream(screen).feed(output.replace("\n", "\r\n"))
    rows = []
    for number in range(LINES):
        row = Text()
        for cell in (screen.buffer[number][column] for column in range(COLUMNS)):
            colour = "" if cell.fg == "default" else {"brown": "yellow"}.get(cell.fg, cell.fg)
            row.append(cell.data, f"{'bold ' if cell.bold else ''}{colour}".strip())
        row.rstrip()
        rows.append(row)
    return rows


def drawn(rows: list[Text]) -> str:
    """The rows as a picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="standard")
    for row in rows:
        console.print(row, no_wrap=True, crop=True)
    return WEB_FONTS.sub("", console.export_svg(title="make demo", unique_id="terminal"))


if __name__ == "__main__":
    main()
