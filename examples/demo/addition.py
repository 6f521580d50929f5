"""Writes the demo's dataset: all sums of two digits as few-shot prompts, 80 to train on, 20 held out.

Owns addition_train.jsonl and addition_heldout.jsonl beside it, which are committed. Run it again
(`python -m examples.demo.addition`) after a change here; a test compares both.
"""

import json
from pathlib import Path

from penstock.seeds import permutation

SPLIT_SEED = 2025  # fixes which pairs are held out
NUM_TRAIN = 80


def lines() -> tuple[list[str], list[str]]:
    """The JSONL lines of the training and of the held-out prompts."""
    rows = [
        json.dumps({"prompt": f"2+5=7\n8+4=12\n{pair // 10}+{pair % 10}=", "answer": str(pair // 10 + pair % 10)})
        for pair in permutation(SPLIT_SEED, 0, 100)
    ]
    return rows[:NUM_TRAIN], rows[NUM_TRAIN:]


def main() -> None:
    folder = Path(__file__).parent
    for name, rows in zip(("addition_train.jsonl", "addition_heldout.jsonl"), lines(), strict=True):
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
