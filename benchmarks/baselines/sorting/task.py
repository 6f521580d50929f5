"""Prompts, demonstrations and the reward of the sorting task.

Owns the vocabulary: one token per character. A prompt is 3 to 6 digits and `=`; an answer is the same digits in some
order and `.`, the end. Pure, but for the generator that is passed in.
"""

from collections.abc import Sequence

import numpy as np

ALPHABET = "0123456789=. abcdefghijklmnopqrstuvwxyz+-*/()<>?!,:"
VOCABULARY_SIZE = len(ALPHABET)
END = ALPHABET.index(".")
SHORTEST, LONGEST = 3, 6
MAX_NEW_TOKENS = LONGEST + 2  # the end, and one more, so that an answer can be too long
DEMONSTRATED = {"ascending": 0.30, "descending": 0.35, "copied": 0.35}


def ids_of(text: str) -> tuple[int, ...]:
    """Token ids of a text.

    >>> ids_of("31=")
    (3, 1, 10)
    """
    return tuple(map(ALPHABET.index, text))


def text_of(ids: Sequence[int]) -> str:
    """The text of token ids."""
    return "".join(ALPHABET[each] for each in ids)


def draw_prompt(generator: np.random.Generator) -> str:
    """A prompt: 3 to 6 digits, which may repeat, and `=`."""
    length = int(generator.integers(SHORTEST, LONGEST + 1))
    return "".join(map(str, generator.integers(0, 10, length))) + "="


def draw_demonstration(generator: np.random.Generator) -> tuple[str, str]:
    """A prompt and an answer in one of the demonstrated orders.

    >>> prompt, answer = draw_demonstration(np.random.default_rng(0))
    >>> sorted(prompt[:-1]) == sorted(answer[:-1]), answer[-1]
    (True, '.')
    """
    prompt = draw_prompt(generator)
    digits = prompt[:-1]
    order = generator.choice(list(DEMONSTRATED), p=list(DEMONSTRATED.values()))
    answer = digits if order == "copied" else "".join(sorted(digits, reverse=order == "descending"))
    return prompt, f"{answer}."


def score(prompt: str, completion: str) -> float:
    """1 if the completion is the digits of the prompt in ascending order, and the end; else 0.

    >>> score("312=", "123."), score("312=", "321."), score("312=", "123")
    (1.0, 0.0, 0.0)
    """
    return float(completion == "".join(sorted(prompt[:-1])) + ".")
