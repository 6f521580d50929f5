"""Prompts and completions as a person reads them: the question without the layout of a chat, a long text cut.

Pure. Known layouts of chats: ChatML, Llama 3, Gemma, Mistral, DeepSeek, Phi, Granite, gpt-oss. A text in another one is
shown as it is.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # categories of characters that move or hide others
LINE_CHARACTERS = 72  # of a prompt or a completion in one line, so that both fit a terminal of 160 columns

# The header of a user's message. It may go on to the end of its own line.
_USER = re.compile(
    r"(?:<\|(?:im_start|start_header_id|start_of_role|start)\|>|<start_of_turn>)user(?:<\|\w+\|>)?"
    "|<\\|user\\|>|<\uff5cUser\uff5c>|\\[INST\\]"
)
_SPECIAL = "(?:<\\|\\w+\\|>|</?s>|<eos>|<bos>|<(?:start|end)_of_turn>|<\uff5c[^<>\n]+\uff5c>|\\[/INST\\])"
_END = re.compile(rf"(?:\s*{_SPECIAL})+\s*\Z")


def question_of(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """What is asked: the last user message of a chat, as messages or as the text of its template; other text as it is.

    >>> question_of([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}])
    '2 + 2?'
    >>> question_of("<|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n")
    '2 + 2?'
    >>> question_of("2+5=7\\n9+6=")
    '2+5=7\\n9+6='
    """
    if isinstance(prompt, str):
        *_, user = [None, *_USER.finditer(prompt)]
        return prompt if user is None else re.split(_SPECIAL, prompt[user.end() :], maxsplit=1)[0].strip()
    asked = [message for message in prompt if message.get("role") == "user"] or prompt
    return str(asked[-1].get("content", "")) if asked else ""


def without_end(completion: str) -> str:
    """A completion without the special tokens that end it.

    >>> without_end("4<|im_end|>\\n"), without_end("4\\n")
    ('4', '4\\n')
    """
    return _END.sub("", completion)


def last_line(text: str) -> str:
    """The last line that is not blank: of a prompt with examples, the one that is asked."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def differing(texts: Sequence[str]) -> list[str]:
    """The part of each text in which it differs from the others, on one line; if all are equal, the last line of each.

    Lines that all begin or end with are left out, and of long lines also such words.

    >>> differing(["Add:\\n2+2=\\nAnswer:", "Add:\\n3+4=\\nAnswer:"])
    ['2+2=', '3+4=']
    """
    rows = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    if len(set(map(tuple, rows))) < 2:
        return [last_line(text) for text in texts]
    parts = [" / ".join(row) for row in _without_common(rows)]
    if max(map(len, parts)) > LINE_CHARACTERS:
        parts = [" ".join(words) for words in _without_common([part.split() for part in parts])]
    return [part or last_line(text) for part, text in zip(parts, texts, strict=True)]


def _without_common(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Each row without the items that all rows begin with, and those that all end with."""
    shortest = min(map(len, rows))
    front = next((n for n in range(shortest) if len({row[n] for row in rows}) > 1), shortest)
    rest = [row[front:] for row in rows]
    shortest -= front
    back = next((n for n in range(shortest) if len({row[-1 - n] for row in rest}) > 1), shortest)
    return [row[: len(row) - back] for row in rest]


def cut(text: str, most: int = LINE_CHARACTERS) -> str:
    """A text of at most about `most` characters: its beginning and its end, and how many are left out.

    A text stays whole if the note would take nearly as many characters as it saves.

    >>> cut("short"), cut("a" * 50 + "b" * 50, 20)
    ('short', 'aaaaaaaaaa [80 characters] bbbbbbbbbb')
    >>> cut("a" * 30, 20)
    'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'
    """
    if len(text) <= most:
        return text
    half = most // 2
    note = f" [{len(text) - 2 * half:,} characters] "
    if len(text) - 2 * half < 2 * len(note):
        return text
    return f"{text[:half].rstrip()}{note}{text[-half:].lstrip()}"


def harmless(text: str) -> str:
    """A user's or a model's text on one line of a terminal: what would move, hide or turn characters is escaped.

    >>> harmless("a\\tb" + chr(0x202E))
    'a\\\\tb\\\\u202e'
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in HIDDEN else char for char in text
    )
