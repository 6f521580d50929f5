"""Writes the harder of the example's two sets: sums of two numbers of two digits, as few-shot prompts.

Owns two_digits.jsonl beside it, which is committed. Run it again (`python -m examples.curriculum.sums`) after a change
here; a test compares both.
"""

import json
from pathlib import Path

from penstock.seeds import permutation

SPLIT_SEED = 2027  # fixes which pairs are used
NUM_TRAIN = 80  # as many as the easy set has


def lines() -> list[str]:
    """The JSONL lines."""
    pairs = [divmod(number, 90) for number in permutation(SPLIT_SEED, 0, 90 * 90)[:NUM_TRAIN]]
    return [
        json.dumps({"prompt": f"12+35=47\n48+27=75\n{left + 10}+{right + 10}=", "answer": str(left + right + 20)})
        for left, right in pairs
    ]


def main() -> None:
    Path(__file__).with_name("two_digits.jsonl").write_text("\n".join(lines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
