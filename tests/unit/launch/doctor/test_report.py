"""The table of the doctor: columns, what to do under each finding, the exit code."""

import pytest

from penstock_launch.doctor.report import (
    WIDTH,
    Group,
    Line,
    Verdict,
    amount,
    exit_code,
    not_looked_at,
    ok,
    problem,
    render,
    warning,
)

LONG = "GPU 0 has fallen off the bus and the driver says so at length " * 4


def test_the_table_reads_well_in_a_log() -> None:
    groups = [
        Group("machine", [ok("CPU cores", "8 of 64"), warning("memory", "1 GiB", "Use less.")]),
        Group("GPUs", []),
        Group("queue", [not_looked_at("queue", "no answer\nin time")]),
    ]
    assert list(render(groups)) == [
        "machine",
        "  ok             CPU cores  8 of 64",
        "  warning        memory     1 GiB",
        "                            -> Use less.",
        "",
        "queue",
        "  not looked at  queue      no answer in time",
        "",
        "No problem, 1 warning; 1 ok, 1 not looked at.",
    ]


def test_long_texts_are_wrapped_in_their_column() -> None:
    lines = list(render([Group("GPUs", [problem("GPU 0", LONG, LONG)])]))
    assert max(map(len, lines)) <= WIDTH
    seen, first, later = lines[2], lines[4], lines[5]
    assert seen.startswith(" " * 24)
    assert first.index("->") == 24
    assert later.startswith(" " * 27)
    assert " ".join(" ".join(lines[1:4]).split()) == f"problem GPU 0 {LONG.strip()}"


def test_a_long_path_stays_in_one_piece() -> None:
    path = "/" + "folder/" * 20
    assert any(path in line for line in render([Group("x", [ok("server", f"it is {path}")])]))


def test_a_problem_is_exit_code_2() -> None:
    fine = [ok("a", "b"), warning("a", "b", "c"), not_looked_at("a", "b")]
    assert exit_code([Group("x", fine)]) == 0
    assert exit_code([Group("x", fine), Group("y", [problem("a", "b", "c")])]) == 2


@pytest.mark.parametrize("verdict", [Verdict.WARNING, Verdict.PROBLEM])
def test_a_finding_says_what_to_do(verdict: Verdict) -> None:
    with pytest.raises(ValueError, match="without advice"):
        Line("memory", verdict, "1 GiB")


def test_sizes() -> None:
    assert [amount(size) for size in (2**26, 2**30 - 1, 81559 * 2**20, 250 * 2**30)] == [
        "64 MiB",
        "1024 MiB",
        "79.6 GiB",
        "250 GiB",
    ]
