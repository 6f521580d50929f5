"""What a person sees of a launch in a terminal: the real command, and services that only pretend to work."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.integration.launch.launch_setup import LaunchSetup
from tests.integration.launch.terminal import Terminal
from tests.patience import START_SECONDS

pytestmark = pytest.mark.redis

CTRL_C = b"\x03"
STEP = re.compile(r"step +(\d+)/1000 ")
PICTURE = ("penstock t  ", "reward    ", "held-out  ", "update    ", "steps     ", "health    ", "sample    ", "  ->  ")


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[LaunchSetup]:
    setup = LaunchSetup(tmp_path)
    yield setup
    setup.end()


def launch(setup: LaunchSetup, columns: int, lines: int) -> Terminal:
    words = ("launch", "local", "--config", "config.yaml", "--run.max_steps", "1000")
    return Terminal(partial(setup.command, *words), columns, lines)


def picture_rows(terminal: Terminal) -> list[str]:
    return [row for row in terminal.rows() if row.startswith(PICTURE)]


def steps(terminal: Terminal) -> list[int]:
    return [int(found[1]) for row in terminal.rows() if (found := STEP.search(row))]


def has_one_picture(terminal: Terminal, columns: int) -> bool:
    """The screen may be seen while it is drawn: only what lasts is wrong."""
    rows = picture_rows(terminal)
    kinds = [row[:5] for row in rows]
    return "penst" in kinds and len(kinds) == len(set(kinds)) and max(map(len, rows)) <= columns - 2


def check_what_stays(terminal: Terminal) -> None:
    """After the end: every step once and in order, nothing of the picture, the cursor."""
    shown = steps(terminal)
    assert shown == list(range(1, len(shown) + 1))
    assert picture_rows(terminal) == []
    assert terminal.cursor_is_shown
    assert not [row for row in terminal.rows() if "Traceback" in row], "\n".join(terminal.rows())
    rows = terminal.rows()
    ending = rows[next(n for n, row in enumerate(rows) if row.startswith("Completions before")) : rows.index("Next:")]
    heads = ("  ", "Completions ", "Ended ", "It has ")
    assert not [row for row in ending if row and not row.startswith(heads)], "the terminal broke a line"


def test_a_run_in_a_terminal_that_changes_its_size_and_ends_by_ctrl_c(
    setup: LaunchSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture has one copy at any size, and is gone at the end; the phase of the end is named."""
    monkeypatch.setenv("COLUMNS", "100")  # as some shells export it, once and for all
    terminal = launch(setup, 120, 40)
    terminal.shows("penstock t  ")
    terminal.shows("step 4/1000")
    terminal.until(partial(has_one_picture, terminal, 120))
    for columns, lines in ((80, 24), (120, 40), (70, 20)):
        terminal.resize(columns, lines)
        terminal.shows(f"step {max(steps(terminal)) + 3}/1000")
        terminal.until(partial(has_one_picture, terminal, columns))
    (setup.run_folder / "hold").touch()
    terminal.press(CTRL_C)
    terminal.shows("penstock t  ending: writing a checkpoint")
    (setup.run_folder / "hold").unlink()
    assert terminal.end(START_SECONDS) == 130
    check_what_stays(terminal)
    text = "\n".join(terminal.rows())
    assert "trainer: ending: writing a checkpoint" in text
    assert re.search(r"trainer: ended after \d", text)


def test_ctrl_c_twice_kills_and_leaves_a_terminal_in_order(setup: LaunchSetup) -> None:
    terminal = launch(setup, 80, 24)
    terminal.shows("step 2/1000")
    (setup.run_folder / "hold").touch()
    terminal.press(CTRL_C)
    terminal.shows("penstock t  ending: writing a checkpoint")
    terminal.press(CTRL_C)
    assert terminal.end(START_SECONDS) == 130
    check_what_stays(terminal)
    assert "Ctrl-C again: killing everything" in "\n".join(terminal.rows())
