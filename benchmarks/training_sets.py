"""What training prompts cost a trainer in memory and at its start: from memory, and from a table on disk, in one run.

    python -m benchmarks.training_sets                       # 30,000 rows, under a minute
    python -m benchmarks.training_sets --rows 2000000 --episodes --folder /data/tmp

Writes a JSONL file of rows of the size of GSM8K's (550 bytes) and reads it three times, each in a process of its own,
through the functions of the trainer's start: into memory, into a new table, and from that table. Prints for each the
seconds until its first ticket, the bytes that it then holds, those after a thousand tickets from all over the epoch,
and the microseconds of one ticket. Imports and the tokenizer are there before. The folder is deleted at the end.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from penstock.config import Config
from penstock_trainer.data.datasets import BegunRows, source_states, training_rows
from penstock_trainer.data.drawing.draws import Draws
from penstock_trainer.data.prompt_table import PromptTables
from penstock_trainer.data.rows import with_rewards
from penstock_trainer.data.run_prompts import encode_prompts
from penstock_trainer.data.tokenizer import load_vocabulary

ROOT = Path(__file__).parents[1]
SIDES = ("memory", "first start", "next start")
NUM_TICKETS = 1000
NUM_TEXTS = 997
WORDS = [
    "Natalia",
    "sold",
    "clips",
    "to",
    "of",
    "her",
    "friends",
    "in",
    "April",
    "and",
    "then",
    "half",
    "as",
    "many",
    "May",
]


class Figures(msgspec.Struct):
    """Of one side. held, after: bytes that only this process has (RssAnon), above those before the rows were read."""

    digest: str
    seconds: float
    held: int
    after: int
    ticket_microseconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--episodes", action="store_true", help="rows that start episodes, which have no tokens yet")
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"), help="whose tokenizer")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's temporary folder")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.side:
        print(msgspec.json.encode(measure(given.side, given.model, given.folder, of_episodes=given.episodes)).decode())
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl", given.rows)
        found = {side: _ask(side, given.model, folder, *["--episodes"] * given.episodes) for side in SIDES}
        table = sum(path.stat().st_size for path in folder.glob("penstock/*/*"))
        source = (folder / "rows.jsonl").stat().st_size
    print(
        f"{given.rows:,} rows of {source / given.rows:.0f} bytes; the table has {table / given.rows:.0f} bytes of each"
    )
    print(report(found, given.rows))


def write_rows(path: Path, count: int) -> None:
    """Rows of the size of GSM8K's, each with a number of its own."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(40, 52))) for _ in range(NUM_TEXTS)]
    with path.open("w") as file:
        for number in range(count):
            prompt = f"{number} {texts[number % NUM_TEXTS]}"
            row = {"prompt": prompt, "answer": texts[number * 7 % NUM_TEXTS], "metadata": {"id": number}}
            file.write(json.dumps(row) + "\n")


def measure(side: str, model: str, folder: Path, *, of_episodes: bool = False) -> Figures:
    """One side, in this process."""
    config = _config(model, folder, of_episodes=of_episodes)
    load_vocabulary(model)
    before, began = _held_bytes(), time.perf_counter()
    rows = with_rewards(training_rows(config.data, of_episodes=of_episodes), config.all_rewards.functions)
    begun = BegunRows(rows, source_states(config))
    prompts = encode_prompts(config, begun, {}, None if side == "memory" else PromptTables(folder / "penstock"))
    begun.close()
    digest = prompts.run_record(config).dataset_digest
    draws = Draws(prompts.train, prompts.sampling(config), config)
    draws.ticket(0, attempt=0, policy_version=0)
    seconds, held = time.perf_counter() - began, _held_bytes() - before
    began = time.perf_counter()
    for number in range(0, draws.num_draws, max(1, draws.num_draws // NUM_TICKETS)):
        draws.ticket(number, attempt=0, policy_version=0)
    microseconds = (time.perf_counter() - began) / NUM_TICKETS * 1e6
    return Figures(digest, seconds, held, _held_bytes() - before, microseconds)


def report(found: dict[str, Figures], num_rows: int) -> str:
    """A table of all sides, with the ratios to that in memory."""
    assert len({each.digest for each in found.values()}) == 1, "all sides have the same prompts"
    memory = found["memory"]
    lines = [f"{'':12} {'start, s':>9} {'ratio':>7} {'held, MB':>9} {'a row, B':>9} {'ratio':>7} {'ticket, us':>11}"]
    for side, each in found.items():
        held = max(each.held, each.after)
        lines.append(
            f"{side:12} {each.seconds:9.2f} {each.seconds / memory.seconds:7.3f} {held / 1e6:9.1f} "
            f"{held / num_rows:9.1f} {held / max(memory.held, memory.after):7.4f} {each.ticket_microseconds:11.1f}"
        )
    return "\n".join(lines)


def _config(model: str, folder: Path, *, of_episodes: bool) -> Config:
    sections: dict[str, Any] = {"actor": {"path": model}, "data": {"train": {"path": str(folder / "rows.jsonl")}}}
    if of_episodes:
        sections["agent"] = {"environment": "envs:Env", "max_tokens": 1024}
    return Config.model_validate(sections)


def _ask(side: str, model: str, folder: Path, *further: str) -> Figures:
    command = [sys.executable, "-m", "benchmarks.training_sets", "--side", side, "--model", model, *further]
    printed = subprocess.run(
        [*command, "--folder", str(folder)], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    return msgspec.json.decode(printed.stdout.splitlines()[-1], type=Figures)


def _held_bytes() -> int:
    """Resident bytes that no file holds: what is mapped of a file goes when others need the memory."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
