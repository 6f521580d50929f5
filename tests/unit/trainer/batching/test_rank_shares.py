"""Ranks in one process: rank numbers, shares of a batch, which rank failed first. tests/integration has real ones."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from penstock.errors import ConfigError, RanksError
from penstock_trainer.batching.batch import BatchRules, Overlong, Sample, make_batch
from penstock_trainer.batching.packing import Pack, PackPlan, Packs, make_packs, sorted_paths, split
from penstock_trainer.batching.rank_shares import assign, even_parts, share
from penstock_trainer.distributed.rank import RankInfo, service_name
from penstock_trainer.torchrun import Meeting, blamed, main, torchrun_arguments
from tests.unit.trainer.trainer_groups import example_groups

TENSORS = [
    field.name for field in fields(Pack) if field.name not in ("indices", "paths", "experts_PW", "teacher_logprobs_N")
]


def samples(num_groups: int = 12) -> tuple[Sample, ...]:
    groups = example_groups(num_groups=num_groups, group_size=6)
    return make_batch(groups, BatchRules(Overlong(8), with_zero_advantage=True), version=0).samples


def test_place_is_what_torchrun_says() -> None:
    assert RankInfo.of({"HOME": "/"}) == RankInfo(0, 1, 0)
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert RankInfo.of(environ) == RankInfo(3, 4, 1)
    assert RankInfo.of(environ).is_follower
    assert (service_name(environ), service_name({})) == ("trainer rank 3", "trainer")


@pytest.mark.parametrize("environ", [{"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}])
def test_half_an_environment_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"expected the numbers RANK, WORLD_SIZE, LOCAL_RANK"):
        RankInfo.of(environ)


def test_split_says_what_make_packs_makes() -> None:
    packs, parts = make_packs(samples(), 24), split(sorted_paths(samples()), 24)
    assert [pack.num_rows for pack in packs] == [part.num_rows for part in parts]
    again = [make_packs([path.sample for path in part.paths], part.num_rows) for part in parts]
    assert [len(each) for each in again] == [1] * len(parts)
    assert all((one.token_ids_P == two[0].token_ids_P).all() for one, two in zip(packs, again, strict=True))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("max_tokens", [16, 40, 4096])
def test_shares_hold_every_loss_token_once_and_are_even(num_ranks: int, max_tokens: int) -> None:
    shares = [share(samples(), max_tokens, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(each.packs) for each in shares}) == 1
    assert len({(each.num_packs, each.num_rows) for each in shares}) == 1
    packs = [pack for each in shares for pack in each.packs]
    assert all(pack.num_rows <= max_tokens for pack in packs)
    expected = share(samples(), 4096, 0, 1).packs[0]
    weights = sorted(float(value) for pack in packs for value in pack.weight_N)
    assert weights == sorted(expected.weight_N.tolist())
    rows = [sum(pack.num_rows for pack in each.packs) for each in shares]
    assert max(rows) <= 1.4 * sum(rows) / num_ranks


def test_even_parts_need_no_more_rounds_than_full_ones() -> None:
    paths = sorted_paths(samples())
    full = len(split(paths, 30))
    assert len(even_parts(paths, 30, 2)) <= full + full % 2


@pytest.mark.parametrize("max_tokens", [16, 40, 4096])
def test_packs_made_ahead_are_those_made_at_once(max_tokens: int) -> None:
    packs, expected = share(samples(), max_tokens, 0, 1).packs, make_packs(samples(), max_tokens)
    assert len(packs) == len(expected)
    for made in (list(packs.made_ahead()), list(packs), packs[:], [*packs[:1], *packs[1:]]):
        for pack, each in zip(made, expected, strict=True):
            assert (pack.indices, pack.paths) == (each.indices, each.paths)
            assert all(torch.equal(getattr(pack, name), getattr(each, name)) for name in TENSORS)


def test_a_pack_that_cannot_be_made_is_an_error_of_its_user() -> None:
    (plan,) = split(sorted_paths(samples()), 4096)
    packs = Packs([plan, replace(plan, num_rows=1)]).made_ahead()
    assert next(packs).num_rows == plan.num_rows
    with pytest.raises(ValueError, match="broadcast"):
        next(packs)


def plainly_assigned(sizes: list[int], num_ranks: int) -> list[list[int]]:
    """The shares of parts by their sizes, of which each goes to the open rank with the fewest rows."""
    num_rounds = -(-len(sizes) // num_ranks)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for size in sorted(sizes, reverse=True):
        min((own for own in shares if len(own) < num_rounds), key=sum).append(size)
    return shares


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 6))
def test_parts_go_to_the_rank_with_the_fewest_rows(sizes: list[int], num_ranks: int) -> None:
    shares = assign([PackPlan((), size) for size in sizes], num_ranks)
    assert [[part.num_rows for part in own] for own in shares] == plainly_assigned(sizes, num_ranks)


def test_a_rank_without_work_gets_a_pack_without_loss() -> None:
    one = samples()[:1]
    first, second = (share(one, 4096, rank, 2) for rank in range(2))
    assert (first.num_packs, second.num_packs) == (1, 1)
    assert [pack.target_N.numel() for pack in second.packs] == [0]
    assert list(share((), 4096, 1, 2).packs) == []


def test_the_rank_to_blame_is_no_victim() -> None:
    def failed(rank: int, exit_code: int, timestamp: int) -> ProcessFailure:
        failure = ProcessFailure(local_rank=rank, pid=0, exitcode=exit_code, error_file="")
        failure.timestamp = timestamp
        return failure

    victim, cause, late = failed(0, RanksError.exit_code, 1), failed(1, 2, 2), failed(2, -15, 3)
    assert blamed({0: victim, 1: cause, 2: late}) == (1, cause)
    assert blamed({0: victim}) == (0, victim)


def test_a_wrong_configuration_is_told_before_any_rank_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(tmp_path / "absent.yaml")]) == ConfigError.exit_code
    assert "trainer: config: --config" in capsys.readouterr().err


def test_of_several_hosts_the_first_with_a_rank_to_blame_says_so(tmp_path: Path) -> None:
    blame = tmp_path / "trainer.exit"
    words = ["--meet", "10.0.0.7:4711", "--num-hosts", "2", "--host-index", "1", "--blame", str(blame)]
    assert main([*words, "--config", str(tmp_path / "absent.yaml")]) == ConfigError.exit_code
    assert blame.read_text() == str(ConfigError.exit_code)
    blame.write_text("70")
    main([*words, "--config", str(tmp_path / "absent.yaml")])
    assert blame.read_text() == "70"


def test_hosts_share_the_ranks_and_meet_at_the_first() -> None:
    arguments = torchrun_arguments(8, Meeting("10.0.0.7", 4711, num_hosts=4, index=3))
    assert {"--nnodes=4", "--node-rank=3", "--nproc-per-node=2"} <= set(arguments)
    assert {"--master-addr=10.0.0.7", "--master-port=4711", "--max-restarts=0"} <= set(arguments)
    assert "--standalone" not in arguments
