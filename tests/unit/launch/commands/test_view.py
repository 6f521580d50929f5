"""Which runs `penstock view` shows, and where it listens."""

import os
import socket
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock_launch.command_line import make_parser
from penstock_launch.commands.view import runs_of, view_runs


def make_runs(root: Path, *names: str) -> None:
    """Each has written later than the one before."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        path = root / name / "steps.jsonl"
        path.touch()
        os.utime(path, (place, place))


def test_without_names_all_runs_are_shown_the_one_that_has_written_last_first(tmp_path: Path) -> None:
    make_runs(tmp_path, "b", "c", "a")
    assert [run.name for run in runs_of([], str(tmp_path))] == ["a", "b", "c"]


def test_named_runs_are_shown_in_their_order_and_once(tmp_path: Path) -> None:
    make_runs(tmp_path, "a", "b")
    folder = str(tmp_path / "b")
    assert [run.name for run in runs_of(["b", "a", "b"], str(tmp_path))] == ["b", "a"]
    assert [run.name for run in runs_of([folder], "elsewhere")] == ["b"]


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    make_runs(tmp_path, "a")
    with pytest.raises(ConfigError, match="'missing'"):
        runs_of(["missing"], str(tmp_path))
    with pytest.raises(ConfigError, match="no run"):
        runs_of([], str(tmp_path / "empty"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "node-7"])
def test_beyond_this_host_it_listens_only_with_a_token(tmp_path: Path, host: str) -> None:
    make_runs(tmp_path, "a")
    arguments = make_parser().parse_args(["view", "a", "--root", str(tmp_path), "--host", host])
    with pytest.raises(ConfigError, match="PENSTOCK_TOKEN"):
        view_runs(arguments, {}, print)


def test_a_port_that_is_taken_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    make_runs(tmp_path, "a")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = make_parser().parse_args(["view", "a", "--root", str(tmp_path), "--port", port])
        with pytest.raises(ConfigError, match="--port: cannot listen"):
            view_runs(arguments, {}, print)
