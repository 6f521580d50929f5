"""The notebook in examples/ runs: its cells in their order, in one Python that shows the value of each cell.

Its cells are plain Python, without the commands of IPython, so that no kernel is needed to run them here.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.launch.launch_setup import LaunchSetup
from tests.patience import START_SECONDS

pytestmark = pytest.mark.redis

ROOT = Path(__file__).parents[3]
NOTEBOOK = ROOT / "examples" / "notebook" / "first_run.ipynb"
KERNEL = """
import ast, json, sys
names = {}
for source in json.load(sys.stdin):
    *before, last = ast.parse(source).body
    shown = isinstance(last, ast.Expr)
    exec(compile(ast.Module(before if shown else [*before, last], []), "cell", "exec"), names)
    if shown:
        print(repr(eval(compile(ast.Expression(last.value), "cell", "eval"), names)))
"""


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[LaunchSetup]:
    """A checkout with the demo's configuration, and stand-ins for what `make demo` makes."""
    setup = LaunchSetup(tmp_path)
    shutil.copytree(ROOT / "examples" / "demo", tmp_path / "examples" / "demo")
    (tmp_path / "examples" / "notebook").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "m").rename(tmp_path / "models" / "SmolLM2-135M-Instruct")
    yield setup
    setup.end()


def test_the_notebook_runs_from_its_first_cell_to_its_last(setup: LaunchSetup) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]  # they would differ at each run
    search = [str(setup.folder / "modules"), *filter(None, sys.path)]
    ran = subprocess.run(
        [sys.executable, "-c", KERNEL],
        input=json.dumps(["".join(cell["source"]) for cell in cells]),
        cwd=setup.folder / "examples" / "notebook",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    first, *lines = ran.stdout.splitlines()
    assert first.startswith("<penstock.Run 'first-run': running: its launcher has pid ")
    assert lines[:20] == [f"{step} 0.5" for step in range(20)]
    assert lines[20:22] == ["   steps  accuracy", "0      0      0.25"]
    assert lines[-1].startswith("RunState(name='finished', reason='the trainer has finished', exit_code=0")
    summary = json.loads((setup.folder / "runs" / "first-run" / "summary.json").read_text())
    assert summary["exit"]["code"] == 0
