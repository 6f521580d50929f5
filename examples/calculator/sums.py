"""Writes the example's dataset: sums of two numbers of two digits, with few-shot text that shows the calculator.

Owns sums_train.jsonl and sums_heldout.jsonl beside it, which are committed. Run it again
(`python -m examples.calculator.sums`) after a change here; a test compares both.
"""

import json
from pathlib import Path

from penstock.seeds import permutation

SPLIT_SEED = 2026  # fixes which pairs are used, and which of them are held out
NUM_TRAIN = 240
NUM_HELD_OUT = 40


def asked(left: int, right: int) -> str:
    """A sum that the calculator is asked for."""
    return f"Q: {left}+{right}\ncalc {left}+{right}\n= {left + right}\nA: {left + right}\n"


def known(left: int, right: int) -> str:
    """A sum that is answered at once."""
    return f"Q: {left}+{right}\nA: {left + right}\n"


SHOWN = asked(52, 39) + known(3, 4) + asked(27, 68) + known(5, 2) + asked(81, 16)


def lines() -> tuple[list[str], list[str]]:
    """The JSONL lines of the training and of the held-out prompts."""
    pairs = [divmod(number, 90) for number in permutation(SPLIT_SEED, 0, 90 * 90)[: NUM_TRAIN + NUM_HELD_OUT]]
    rows = [
        json.dumps({"prompt": f"{SHOWN}Q: {left + 10}+{right + 10}\n", "answer": str(left + right + 20)})
        for left, right in pairs
    ]
    return rows[:NUM_TRAIN], rows[NUM_TRAIN:]


def main() -> None:
    folder = Path(__file__).parent
    for name, rows in zip(("sums_train.jsonl", "sums_heldout.jsonl"), lines(), strict=True):
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
