r"""Numbers in text: their positions and values.

Owns the grammar. Invariant: linear time and bounded memory for any text that a model can produce; a text is never
evaluated. Values are decimals, so that 0.1 is 0.1 and 1e999999999 costs nothing.

A text that looks like a number but is part of something else (2\sqrt{3}, a date, a time, 3i) is found too, without a
value: otherwise an earlier number would count as the last one.
"""

import re
from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import NamedTuple

from penstock_reward.functions.notation import plain

DEFAULT_TOLERANCE = Decimal("1.00001e-6")  # of the answer; a hair above 1e-6, so that 0.333333 is 1/3
PRECISION = 50
_MAX_DIGITS = 1000  # no answer has more; decimal arithmetic grows faster than linearly with them
_MAX_EXPONENT_DIGITS = 6  # of a power that is computed
_CONTEXT = Context(prec=PRECISION, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])  # 1e-999999999 is not 0

_INTEGER = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])"  # 1,234,567
    r"|[0-9]{1,2}(?:,[0-9]{2}){1,6},[0-9]{3}(?![0-9])"  # 12,34,567 in India
    "|[0-9]{1,3}(?:[\u2009_][0-9]{3})+(?![0-9])"  # thin spaces, and Python's 1_000
    r"|[0-9]+)"
)
_UNSIGNED = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,9}}(?![0-9A-Za-z]))?"
_BRACED = r"(?:\{{\s?(?P<{0}>-?{1})\s?\}}|(?P<{0}_digit>[0-9]))"
_FRACTION = rf"\\frac\s?{_BRACED.format('top', _UNSIGNED)}\s?{_BRACED.format('bottom', _UNSIGNED)}"
_EXPONENT = r"\s?(?:\{\s?(?P<braced>[+-]?[0-9]{1,9})\s?\}|(?P<exponent>[+-]?[0-9]{1,9}))"

# Where a number may begin: not within a name, a date, an exponent or an index. A sign belongs to the number unless it
# subtracts from a term before it: 10-3, x-3, (2)-3. Currency may stand between sign and digits.
_START = re.compile(
    r"(?<![0-9A-Za-z])(?<![0-9A-Za-z]_)(?<![0-9A-Za-z]__)(?<![0-9]/)(?<![0-9]\.)(?<![\^_]\{)(?<!\^)(?<!\^[+-])"
    r"(?<!\^\{[+-])(?:(?P<sign>negative\s)|(?<![)\]}])(?P<mark>[+-]))?[$\u20ac\u00a3]?"
    r"(?=[0-9]|\.[0-9]|\\(?:frac|sqrt|pm|infty|pi)(?![A-Za-z]))"
)


def _number(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("_", "").replace("\u2009", ""))


def _nothing(match: re.Match[str]) -> Decimal | None:
    return None


def _ratio(match: re.Match[str]) -> Decimal | None:
    top = _number(match["top"] or match["top_digit"])
    value = _CONTEXT.divide(top, _number(match["bottom"] or match["bottom_digit"]))
    whole = _number(match["whole"] or "0")
    return _CONTEXT.add(whole, value)


def _slash(match: re.Match[str]) -> Decimal | None:
    return _CONTEXT.divide(_number(match["top"]), _number(match["bottom"]))


def _mixed(match: re.Match[str]) -> Decimal | None:
    return _CONTEXT.add(_number(match["whole"]), _slash(match) or Decimal(0))


def _scientific(match: re.Match[str]) -> Decimal | None:
    return _CONTEXT.multiply(_number(match["top"]), Decimal(f"1e{match['braced'] or match['exponent']}"))


def _power(match: re.Match[str]) -> Decimal | None:
    exponent = match["braced"] or match["exponent"]
    if len(exponent.lstrip("+-")) > _MAX_EXPONENT_DIGITS:
        return None
    return _CONTEXT.power(_number(match["top"]), Decimal(exponent))


def _alone(match: re.Match[str]) -> Decimal | None:
    return _number(match["top"])


_FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Decimal | None]], ...] = (
    (re.compile(r"0[xX][0-9A-Fa-f]+"), _nothing),
    (re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?![0-9])"), _nothing),
    (re.compile(r"[0-9]+(?::[0-9]+)+"), _nothing),
    (re.compile(r"[0-9]+(?:\.[0-9]+){2,}"), _nothing),
    (re.compile(r"[0-9]+(?:\s?/\s?[0-9]+){2,}"), _nothing),
    (re.compile(rf"(?:(?:{_UNSIGNED})\s?)?\\sqrt\s?(?:\[[0-9]\]\s?)?\{{?[0-9]*"), _nothing),
    (re.compile(rf"(?:(?:{_UNSIGNED})\s?)?\\(?:pi|infty)(?![A-Za-z])|(?:{_UNSIGNED})i(?![A-Za-z])"), _nothing),
    (re.compile(rf"{_FRACTION}\s?(?:\\sqrt|\\pi|i(?![A-Za-z]))"), _nothing),
    (re.compile(r"\\pm\s?[0-9]*"), _nothing),
    (re.compile(rf"(?:(?P<whole>{_INTEGER})\s?)?{_FRACTION}"), _ratio),
    (
        re.compile(rf"(?P<whole>{_INTEGER}) (?P<top>[0-9]{{1,3}})/(?P<bottom>[0-9]{{1,4}})(?![0-9]|\s?/|\.\d)"),
        _mixed,
    ),
    (re.compile(rf"(?P<top>{_UNSIGNED})\s?(?:\\times|\\cdot|[x*])\s?10\s?(?:\^|\*\*){_EXPONENT}"), _scientific),
    (re.compile(rf"(?P<top>{_UNSIGNED})(?:\s?\^|\*\*(?=[0-9+-])){_EXPONENT}"), _power),
    (re.compile(rf"(?P<top>{_UNSIGNED})\s?/\s?(?P<bottom>{_UNSIGNED})(?![0-9]|\s?/)"), _slash),
    (re.compile(rf"(?P<top>{_UNSIGNED})"), _alone),
    (re.compile(r"\\[A-Za-z]+"), _nothing),  # \frac{x}{2}
)

_EQUALS = re.compile(r"=|\\approx(?![A-Za-z])")
_WORDS = re.compile(
    r"\\(?:text|textit|mathrm|mbox)\s?\{[^{}]*\}|\^\s?\{?\s?\\circ\s?\}?|\^\s?\{?[23]\}?(?=\W|$)|\\[ ()\[\]]"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|bf|rm)\s?\{([^{}]*)\}")
_MATHEMATICS = re.compile(r"[\\^<>+*/{}\[\]()|!]|^-|-$")
_FACTOR = re.compile(r"[a-z](?![A-Za-z])")  # directly after a number: 2x, 3n
_FACTORS = frozenset("abckntuvwxyz")


class Number(NamedTuple):
    """A number and its position in a text; `value`: None if the text only looks like a number."""

    start: int
    end: int
    value: Decimal | None


def number_at(text: str, start: re.Match[str]) -> Number:
    """The number that begins at a match of the pattern for beginnings."""
    match, value_of = next(
        (match, value_of) for pattern, value_of in _FORMS if (match := pattern.match(text, start.end()))
    )
    value = None if len(match[0]) > _MAX_DIGITS else value_of(match)
    if value is not None and not value.is_finite():
        value = None
    if value is not None and (start["sign"] or start["mark"] == "-"):
        value = value.copy_negate()
    return Number(start.start(), match.end(), value)


def numbers(text: str) -> list[Number]:
    """Every number in a text that is in `plain` notation, in order."""
    found: list[Number] = []
    position = 0
    while (start := _START.search(text, position)) is not None:
        found.append(number_at(text, start))
        position = found[-1].end
    return found


def find_numbers(text: str) -> list[Decimal | None]:
    """The value of every number in a text, in order."""
    return [each.value for each in numbers(plain(text))]


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None also if that has no value."""
    values = find_numbers(text)
    return values[-1] if values else None


def leading_number(text: str) -> tuple[Decimal | None, str] | None:
    """The number with which a text begins, and the rest of the text; None if it does not begin with a number."""
    text = plain(text)
    start = _START.match(text)
    if start is None:
        return None
    found = number_at(text, start)
    return found.value, text[found.end :]


def sole_number(text: str) -> Decimal | None:
    """The only number of an answer, or of its last equation; words and units may surround it."""
    text = plain(text).strip()
    if wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[1]
    text = _EQUALS.split(_WORDS.sub(" ", text))[-1]
    text = text.replace("$", " ").replace("*", " ").replace("`", " ").strip(" \t\n.,;:\u2009")
    found = numbers(text)
    if len(found) != 1:
        return None
    before, after = text[: found[0].start], text[found[0].end :]
    factor = _FACTOR.match(after)
    if _MATHEMATICS.search(before) or _MATHEMATICS.search(after) or (factor and factor[0] in _FACTORS):
        return None
    return found[0].value


def whole_number_text(text: str) -> Decimal:
    """A text that is one number (currency, percent and a final period aside); ValueError otherwise."""
    stripped = plain(text).strip().strip("$").rstrip(".%").strip()
    start = _START.match(stripped)
    found = None if start is None else number_at(stripped, start)
    if found is None or found.value is None or found.end != len(stripped):
        raise ValueError(f"the answer is {text[:80]!r}; expected one number, such as 42, -1,234.5 or 3/4")
    return found.value


def equal(value: Decimal, answer: Decimal, tolerance: Decimal | None = None) -> bool:
    """Integers must be equal; other numbers must agree within `tolerance`, or 1e-6 of the answer if none is given."""
    if value == answer:
        return True
    if tolerance is None:
        if value == value.to_integral_value() and answer == answer.to_integral_value():
            return False
        tolerance = _CONTEXT.multiply(DEFAULT_TOLERANCE, answer.copy_abs())
    return _CONTEXT.abs(_CONTEXT.subtract(value, answer)) <= tolerance
