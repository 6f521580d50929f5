r"""One notation instead of many: Unicode and TeX in the plain form that the grammar of numbers reads.

Owns the tables. `3\,000\%`, `\tfrac12`, `3\u00bd` become `3000%`, `\frac12`, `3 1/2`. Nothing is evaluated.
"""

import re

_THIN = "\u2009"  # a space that groups digits
_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",  # minus sign
        "\u2013": "-",  # en dash
        "\uff0d": "-",
        "\u00d7": r"\times ",
        "\u22c5": r"\cdot ",
        "\u00b7": r"\cdot ",
        "\u00a0": _THIN,
        "\u202f": _THIN,
        "\u2044": "/",
        "\u221a": r"\sqrt ",
        "\u03c0": r"\pi ",
        "\u00b1": r"\pm ",
        "\u221e": r"\infty ",
        "\u2248": r"\approx ",
        "\u00b0": " ",  # degrees
        "\u00bc": " 1/4",
        "\u00bd": " 1/2",
        "\u00be": " 3/4",
        "\u2153": " 1/3",
        "\u2154": " 2/3",
        "\u215b": " 1/8",
        "\u215c": " 3/8",
        "\u215d": " 5/8",
        "\u215e": " 7/8",
    }
) | {0xFF10 + digit: str(digit) for digit in range(10)}
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_LOWERED = str.maketrans(_SUPERSCRIPTS, "0123456789-+")
_TYPESETTING = (
    (re.compile(r"\\!|\\(?:left|right|displaystyle)(?![A-Za-z])"), ""),
    (re.compile(r"\\[,;:]|\\thinspace(?![A-Za-z])"), _THIN),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(\\[A-Za-z]+)(?: +|(?=[0-9]))"), r"\1 "),
)


def plain(text: str) -> str:
    """The text with one form of every sign, space, fraction and exponent."""
    text = _RAISED.sub(lambda match: "^" + match[0].translate(_LOWERED), text.translate(_CHARACTERS))
    for pattern, replacement in _TYPESETTING:
        text = pattern.sub(replacement, text)
    return text
