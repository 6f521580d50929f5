"""Numbers in text: where they are and what they are worth.

Owns the grammar. Invariant: linear time and bounded memory for any text that a model can produce; a text is never
evaluated. Values are decimals, so that 0.1 is 0.1 and 1e999999999 costs nothing.
"""

import re
from decimal import Context, Decimal

DEFAULT_TOLERANCE = Decimal("1e-6")  # relative to the answer where that is larger than 1: six digits of 1/3 pass
PRECISION = 50
_MAX_DIGITS = 1000  # no answer has more; decimal arithmetic grows faster than linearly with them
_CONTEXT = Context(prec=PRECISION, traps=[])
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_UNSIGNED = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,9}}(?![0-9A-Za-z]))?"
# A sign belongs to the number unless something stands before it that it subtracts from: 10-3, x-3, (2)-3.
# Currency may stand between sign and digits. A slash makes a fraction unless a third part follows, as in a date.
NUMBER = re.compile(
    r"(?<![0-9A-Za-z_])(?<![0-9]/)(?:(?<![)\]}])(?P<sign>[+-]))?[$\u20ac\u00a3]?"
    rf"(?P<top>{_UNSIGNED})(?:\s?/\s?(?P<bottom>{_UNSIGNED})(?![0-9]|\s?/))?"
)
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-"})  # minus sign and en dash


def find_numbers(text: str) -> list[Decimal]:
    """Every number in a text, in order."""
    values = (_value(match) for match in NUMBER.finditer(text.translate(_MINUS)))
    return [value for value in values if value is not None]


def last_number(text: str) -> Decimal | None:
    """The last number in a text."""
    numbers = find_numbers(text)
    return numbers[-1] if numbers else None


def whole_number_text(text: str) -> Decimal:
    """A text that is one number (currency, percent and a final period aside); ValueError otherwise."""
    stripped = text.strip().translate(_MINUS).rstrip(".%").rstrip()
    match = NUMBER.fullmatch(stripped)
    value = None if match is None else _value(match)
    if value is None:
        raise ValueError(f"the answer is {text[:80]!r}; expected one number, such as 42, -1,234.5 or 3/4")
    return value


def equal(value: Decimal, answer: Decimal, tolerance: Decimal | None = None) -> bool:
    """Integers must be the same; other numbers within `tolerance`, or 1e-6 of the answer if none is given."""
    if value == answer:
        return True
    if tolerance is None:
        if value == value.to_integral_value() and answer == answer.to_integral_value():
            return False
        tolerance = _CONTEXT.multiply(DEFAULT_TOLERANCE, max(Decimal(1), answer.copy_abs()))
    return _CONTEXT.abs(_CONTEXT.subtract(value, answer)) <= tolerance


def _value(match: re.Match[str]) -> Decimal | None:
    """None for what looks like a number and has no value: 1/0, or more digits than any answer has."""
    top, bottom = match["top"].replace(",", ""), (match["bottom"] or "1").replace(",", "")
    if max(len(top), len(bottom)) > _MAX_DIGITS:
        return None
    value, divisor = Decimal(top), Decimal(bottom)
    if divisor != 1:
        value = _CONTEXT.divide(value, divisor)
    if not value.is_finite():
        return None
    return value.copy_negate() if match["sign"] == "-" else value
