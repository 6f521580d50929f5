"""The Markdown of a folder of results: hardware and versions, the checks, and a table for each part.

Owns the layout. Pure: from lines to text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]


def report(parts: Mapping[str, Sequence[Line]]) -> str:
    """The text of all parts that have lines, in their order."""
    ran = {part: lines for part, lines in parts.items() if lines}
    if not ran:
        return "No part has run."
    text = [_machine(ran), _checks(ran)]
    text += [_part(part, lines) for part, lines in ran.items()]
    return "\n\n".join(filter(None, text))


def failures(parts: Mapping[str, Sequence[Line]]) -> list[str]:
    """Checks that did not pass, and parts that did not end."""
    found = [
        f"{line['part']}: {line['case']}: {line['name']} is {_number(line['value'])}, and at most "
        f"{_number(line['limit'])} passes"
        for lines in parts.values()
        for line in lines
        if line["kind"] == "figure" and line["passed"] is False
    ]
    for part, lines in parts.items():
        if lines and (lines[-1]["kind"] != "end" or lines[-1]["state"] != "done"):
            state = f"{lines[-1]['state']}: {lines[-1]['note']}" if lines[-1]["kind"] == "end" else "it has no end"
            found.append(f"{part}: {state}")
    return found


def _machine(parts: Mapping[str, Sequence[Line]]) -> str:
    """The first facts of all: the parts of one folder ran on one machine."""
    facts: dict[str, Any] = {}
    for lines in parts.values():
        for line in lines:
            if line["kind"] == "facts":
                facts = {**{key: value for key, value in line.items() if key not in ("part", "kind")}, **facts}
    shown = ", ".join(f"{key} {_shown(value)}" for key, value in facts.items() if value not in ("", [], None))
    return f"Machine: {shown}."


def _checks(parts: Mapping[str, Sequence[Line]]) -> str:
    checks = [
        line for lines in parts.values() for line in lines if line["kind"] == "figure" and line["limit"] is not None
    ]
    failed = failures(parts)
    summary = f"{sum(bool(line['passed']) for line in checks)} of {len(checks)} checks passed." if checks else ""
    return "\n".join(filter(None, [summary, *(f"* **{each}**" for each in failed)]))


def _part(part: str, lines: Sequence[Line]) -> str:
    figures = [line for line in lines if line["kind"] == "figure"]
    rows = ["| Case | Figure | Value | |", "| --- | --- | ---: | --- |"]
    rows += [f"| {line['case']} | {line['name']} | {_number(line['value'])} | {_remark(line)} |" for line in figures]
    skipped = [f"* not measured: {line['case']}: {line['reason']}" for line in lines if line["kind"] == "skipped"]
    ends = [f"{line['state']} in {line['seconds']:.0f} s" for line in lines if line["kind"] == "end"]
    head = f"### {part} ({ends[-1] if ends else 'cut off'})"
    return "\n\n".join(filter(None, [head, "\n".join(rows) if figures else "", "\n".join(skipped)]))


def _remark(line: Line) -> str:
    parts = [line["unit"], line["note"]]
    if line["limit"] is not None:
        parts.append(f"at most {_number(line['limit'])}" + ("" if line["passed"] else ": **failed**"))
    return "; ".join(filter(None, parts))


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.3g}"


def _shown(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)
