"""Writes deploy/grafana/dashboards/*.json.

Owns these files: they are never edited by hand, nor in Grafana. `make docs` runs this; `make lint` runs it with
`--check`, which changes nothing and fails if a file differs.
"""

import argparse
import sys
from pathlib import Path

from deploy.grafana.agent import agent
from deploy.grafana.overview import overview
from deploy.grafana.panels import as_json
from deploy.grafana.queue import queue
from deploy.grafana.rollout import rollout
from deploy.grafana.trainer import trainer

FOLDER = Path(__file__).parent / "dashboards"


def files() -> dict[Path, str]:
    """Path and content of each dashboard."""
    made = {
        "overview": overview(),
        "rollout": rollout(),
        "agent": agent(),
        "trainer": trainer(),
        "queue": queue(),
    }
    return {FOLDER / f"{name}.json": as_json(dashboard) for name, dashboard in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write Grafana's dashboards.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file differs")
    arguments = parser.parse_args()
    wanted = files()
    present = {path: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    if not arguments.check:
        for path in present.keys() - wanted.keys():
            path.unlink()
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
    elif present != wanted:
        names = sorted(path.name for path in {*present, *wanted} if present.get(path) != wanted.get(path))
        sys.exit(f"deploy/grafana/dashboards: {', '.join(names)} differ from the code: run `make docs` and commit it")


if __name__ == "__main__":
    main()
