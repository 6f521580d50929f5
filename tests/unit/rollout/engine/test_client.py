"""SGLang's client against a fake server over real HTTP."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from penstock.config import EngineSection
from penstock.contracts import PolicyIdentity, Sampling, pack_int32, unpack_int32
from penstock.errors import EngineDiedError, EngineError, EngineRejectedError
from penstock_rollout.engine.sglang.arguments import command, environment
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.engine.types import CompletionRequest, EngineAbsentError, GroupAnswer, completions
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.fake_model import prompt_logprobs
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving

PROMPT = pack_int32([1, 2, 3])
SAMPLING = Sampling(1.0, 4, (5,))
KNOWN = {"default": PolicyIdentity(0, "0" * 16)}


@pytest.fixture
def fake(tmp_path: Path) -> FakeSGLang:
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    fake = FakeSGLang()
    fake.model_path = str(tmp_path)
    return fake


@pytest.fixture
async def client(fake: FakeSGLang) -> AsyncIterator[SGLangClient]:
    async with serving(fake) as url:
        client = SGLangClient(EngineSection(request_timeout_seconds=ANSWER_SECONDS))
        await client.connect(url)
        yield client
        await client.close()


async def generate(client: SGLangClient, prompt: bytes, seeds: Sequence[int], sampling: Sampling) -> GroupAnswer:
    requests = [CompletionRequest(tuple(unpack_int32(prompt)), seed, sampling.max_new_tokens) for seed in seeds]
    return await client.generation.complete(requests, sampling)


async def test_a_group_is_one_request_with_a_seed_per_completion(fake: FakeSGLang, client: SGLangClient) -> None:
    answer = await generate(client, PROMPT, (7, 8), SAMPLING)
    prefill, request = [body for path, body in fake.calls if path == "/generate"]
    assert prefill["sampling_params"]["max_new_tokens"] == 0
    assert request["input_ids"] == [[1, 2, 3]] * 2
    assert [params["sampling_seed"] for params in request["sampling_params"]] == [7, 8]
    first, second = completions(answer, KNOWN)
    assert len(unpack_int32(first.token_ids)) == 4
    assert first.token_ids != second.token_ids
    assert first.spans[0].policy == KNOWN["default"]
    assert (first.loss_mask, first.num_loss_tokens) == (None, 4)


async def test_an_engine_gets_what_changes_how_tokens_are_sampled_and_nothing_else(
    fake: FakeSGLang, client: SGLangClient
) -> None:
    full = Sampling(0.7, 4, (5,), ("END",), ignore_eos=True, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.2)
    for sampling in (SAMPLING, full):
        await generate(client, PROMPT, (7,), sampling)
    plain, asked = [body["sampling_params"][0] for path, body in fake.calls if path == "/generate"]
    own = {"skip_special_tokens": True, "max_new_tokens": 4, "sampling_seed": 7}
    assert plain == {"temperature": 1.0, "stop_token_ids": [5], **own}
    assert asked == {
        **{"temperature": 0.7, "stop_token_ids": [5], "stop": ["END"], "stop_regex": [r"\Zx{3}"], "ignore_eos": True},
        **{"top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2},
        **own,
    }


def test_what_widens_the_search_for_stop_strings_matches_nothing() -> None:
    for text in ("", "x" * 40, "x" * 40 + "\n", "\n" + "x" * 40):
        assert re.search(r"\Zx{3}", text) is None


async def test_a_pause_waits_for_the_pass_that_runs_as_long_as_it_is_told(
    fake: FakeSGLang, client: SGLangClient
) -> None:
    """On a CPU, a prefill of thousands of tokens may take longer than the deadline of other calls."""
    client.connection.control_timeout_seconds, fake.pass_seconds = 1.0, 1.5
    await client.generation.pause("retract", ANSWER_SECONDS)
    fake.pass_seconds = 2 * ANSWER_SECONDS
    with pytest.raises(TimeoutError, match=r"did not answer /set_internal_state in 0\.2 s"):
        await client.generation.pause("in_place", 0.2)
    assert fake.paths().count("/pause_generation") == 2


@pytest.mark.parametrize("skips", [True, False])
async def test_texts_hold_special_tokens_if_rewards_need_them(fake: FakeSGLang, skips: bool) -> None:
    async with serving(fake) as url:
        client = SGLangClient(EngineSection(skip_special_tokens=skips))
        await client.connect(url)
        await generate(client, PROMPT, (7, 8), SAMPLING)
        await client.generation.detokenize([[1, 2]])
        await client.close()
    *_, request = [body for path, body in fake.calls if path == "/generate"]
    [pieces] = [body for path, body in fake.calls if path == "/detokenize"]
    assert {params["skip_special_tokens"] for params in request["sampling_params"]} == {skips}
    assert pieces["skip_special_tokens"] is skips


async def test_it_says_what_the_server_is(client: SGLangClient) -> None:
    assert client.info.name == "sglang 0.5.21"
    assert (client.info.vocabulary_size, client.info.context_length) == (100, 64)
    assert (client.info.cache_tokens, client.info.longest_sequence) == (4096, 58)


@pytest.mark.parametrize(
    ("prompt", "stop", "match"),
    [([1, 100], (), "token id 100"), ([-1], (), "token id -1"), ([1], (100,), "token id 100")],
)
async def test_ids_outside_the_vocabulary_never_reach_the_server(
    fake: FakeSGLang, client: SGLangClient, prompt: list[int], stop: tuple[int, ...], match: str
) -> None:
    with pytest.raises(EngineRejectedError, match=match):
        await generate(client, pack_int32(prompt), (1,), Sampling(1.0, 4, stop))
    assert "/generate" not in fake.paths()


@pytest.mark.parametrize(("context_length", "cache_tokens"), [(64, 4096), (4096, 64)])
async def test_too_long_a_request_is_refused_with_the_keys_to_change(
    fake: FakeSGLang, context_length: int, cache_tokens: int
) -> None:
    """SGLang would take it, and cut its completion."""
    fake.context_length, fake.cache_tokens = context_length, cache_tokens
    client = SGLangClient(EngineSection(request_timeout_seconds=ANSWER_SECONDS))
    async with serving(fake) as url:
        await client.connect(url)
        (answer,) = await generate(client, PROMPT, (1,), Sampling(1.0, 55, ()))
        assert len(answer.token_ids) == 55
        sent = fake.paths().count("/generate")
        keys = r"at most 58.* rollout\.engine\.context_length or rollout\.engine\.max_total_tokens"
        with pytest.raises(EngineRejectedError, match=rf"3 tokens and 56 new ones need 59; expected {keys}"):
            await generate(client, PROMPT, (1,), Sampling(1.0, 56, ()))
        assert fake.paths().count("/generate") == sent
        await client.close()


async def test_a_completion_that_the_engine_cut_is_none(fake: FakeSGLang, client: SGLangClient) -> None:
    """By a limit that it does not report: a completion of this length was not asked for."""
    fake.most_tokens = 3
    with pytest.raises(EngineRejectedError, match=r"the engine cut the completion after 3 tokens.*max_new_tokens"):
        await generate(client, PROMPT, (1, 2), SAMPLING)
    fake.finish_reason = "stop"
    assert [len(each.token_ids) for each in await generate(client, PROMPT, (1, 2), SAMPLING)] == [3, 3]


async def test_a_refusal_is_the_requests_fault(fake: FakeSGLang, client: SGLangClient) -> None:
    fake.context_length = 4
    with pytest.raises(EngineRejectedError, match="too long"):
        await generate(client, PROMPT, (1,), SAMPLING)


async def test_a_broken_connection_is_a_death(fake: FakeSGLang, client: SGLangClient) -> None:
    fake.die_on_generate = True
    with pytest.raises(EngineDiedError) as caught:
        await generate(client, PROMPT, (1,), SAMPLING)
    assert not isinstance(caught.value, EngineAbsentError)


async def test_a_server_that_is_not_there_was_never_reached(fake: FakeSGLang) -> None:
    client = SGLangClient(EngineSection())
    with pytest.raises(EngineAbsentError):
        await client.loading.weight_version()
    async with serving(fake) as url:
        await client.connect(url)
    with pytest.raises(EngineAbsentError):
        await generate(client, PROMPT, (1,), SAMPLING)
    await client.close()


async def test_no_answer_in_time_names_what_was_waited_for(fake: FakeSGLang) -> None:
    fake.holds_at = 1
    async with serving(fake) as url:
        client = SGLangClient(EngineSection(request_timeout_seconds=1))
        await client.connect(url)
        with pytest.raises(TimeoutError, match="/generate in 1 s"):
            await generate(client, PROMPT, (1,), SAMPLING)
        await client.close()


async def test_closing_ends_what_waits(fake: FakeSGLang, client: SGLangClient) -> None:
    fake.holds_at = 1
    waiting = asyncio.create_task(generate(client, PROMPT, (1,), SAMPLING))
    await fake.running.wait()
    await client.close()
    with pytest.raises(EngineDiedError):
        await waiting


async def test_closing_ends_what_still_connects(fake: FakeSGLang, client: SGLangClient) -> None:
    asking = [asyncio.create_task(client.loading.weight_version()) for _ in range(8)]
    await asyncio.sleep(0)
    await client.close()
    assert {type(each) for each in await asyncio.gather(*asking, return_exceptions=True)} == {EngineDiedError}


@pytest.mark.parametrize("answer", [{}, [], [{}], [{"text": "", "output_ids": [1], "meta_info": {}}]])
async def test_an_answer_that_is_none_is_an_error(fake: FakeSGLang, client: SGLangClient, answer: object) -> None:
    fake.answer = answer
    with pytest.raises(EngineError):
        await generate(client, PROMPT, (1,), SAMPLING)


async def test_only_prefixes_of_the_served_version_are_reused(fake: FakeSGLang, client: SGLangClient) -> None:
    await generate(client, PROMPT, (1, 2), SAMPLING)
    await client.generation.drop_prefixes("3-abc", flush=False)
    await generate(client, PROMPT, (1, 2), SAMPLING)
    # Again, after other weights: prefixes cached meanwhile may be by those.
    await client.generation.drop_prefixes("3-abc", flush=False)
    await generate(client, PROMPT, (1, 2), SAMPLING)
    keys = [body["extra_key"] for path, body in fake.calls if path == "/generate"]
    assert keys[::2] == keys[1::2]  # prompts that fill the cache included
    assert len(set(keys)) == 3


async def test_a_probe_returns_one_logprob_per_token_but_the_first(fake: FakeSGLang, client: SGLangClient) -> None:
    assert await client.generation.prompt_logprobs((7, 8, 9), ANSWER_SECONDS) == prompt_logprobs((7, 8, 9), "default")
    with pytest.raises(EngineRejectedError, match="token id 100"):
        await client.generation.prompt_logprobs((7, 100), ANSWER_SECONDS)


async def test_prompts_that_begin_as_the_probe_find_it_in_the_cache(fake: FakeSGLang, client: SGLangClient) -> None:
    shared = tuple(range(40))
    prompts = [pack_int32([*shared, last]) for last in (41, 42, 43)]
    await client.generation.prompt_logprobs(shared, ANSWER_SECONDS)
    await asyncio.gather(*(generate(client, prompt, (1, 2), SAMPLING) for prompt in prompts))
    sent = [body["input_ids"] for path, body in fake.calls if path == "/generate"]
    assert [list(shared)] not in sent[1:]  # not once more for the groups
    # Other weights: prefixes that the old ones computed are useless.
    await client.generation.drop_prefixes("3-abc", flush=False)
    await asyncio.gather(*(generate(client, prompt, (1, 2), SAMPLING) for prompt in prompts))
    sent = [body["input_ids"] for path, body in fake.calls if path == "/generate"]
    assert sent.count([list(shared)]) == 1


def test_extra_arguments_come_last_and_win() -> None:
    section = EngineSection(extra_args=("--dtype", "float32"), context_length=128)
    arguments = command(section, "python", "cpu", "model", 1234)
    assert arguments[-2:] == ["--dtype", "float32"]
    assert arguments[arguments.index("--context-length") + 1] == "128"
    assert "--attention-backend" not in command(section, "python", "cuda", "model", 1234)


@pytest.mark.parametrize(
    ("device", "given", "tokens", "expected"),
    [
        ("cuda", 0.0, 0, None),
        ("cuda", 0.41, 0, "0.41"),
        ("cpu", 0.5, 0, "0.5"),
        ("cpu", 0.0, 0, "0.4"),
        ("cpu", 0.0, 16384, "0.9"),
    ],
)
def test_the_share_of_memory_is_the_keys_or_that_of_the_device(
    device: str, given: float, tokens: int, expected: str | None
) -> None:
    section = EngineSection(memory_fraction=given, max_total_tokens=tokens)
    seen = dict(pairwise(command(section, "python", device, "model", 1234)))
    assert seen.get("--mem-fraction-static") == expected


def test_a_model_is_sharded_over_as_many_gpus_as_its_key_says() -> None:
    assert "--tp-size" not in command(EngineSection(), "python", "cuda", "model", 1234)
    two = command(EngineSection(tensor_parallel_size=2), "python", "cuda", "model", 1234)
    assert two[two.index("--tp-size") + 1] == "2"


@pytest.mark.parametrize(
    ("device", "overlap", "off"), [("cuda", True, False), ("cuda", False, True), ("cpu", True, True)]
)
def test_a_server_that_may_stand_still_in_place_does_not_overlap(device: str, overlap: bool, off: bool) -> None:
    arguments = command(EngineSection(), "python", device, "model", 1234, overlap=overlap)
    assert ("--disable-overlap-schedule" in arguments) is off


@pytest.mark.parametrize(
    ("device", "takes_turns", "saves"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_an_engine_that_shares_its_gpu_can_give_its_memory_up(device: str, takes_turns: bool, saves: bool) -> None:
    arguments = command(EngineSection(), "python", device, "model", 1234, gives_up_memory=takes_turns)
    assert ("--enable-memory-saver" in arguments) is saves  # its package is for GPUs


def test_the_services_own_python_path_does_not_reach_the_engine(tmp_path: Path) -> None:
    variables = environment(EngineSection(), "cpu", str(tmp_path), 30000, {"PYTHONPATH": "x", "HOME": "h"})
    assert "PYTHONPATH" not in variables
    assert (variables["HOME"], variables["OMP_NUM_THREADS"], variables["HF_HUB_OFFLINE"]) == ("h", "1", "1")
    assert "HF_HUB_OFFLINE" not in environment(EngineSection(), "cuda", "owner/model", 30000, {})


def test_log_probabilities_are_after_temperature_whatever_the_users_environment_has() -> None:
    inherited = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
    for device in ("cpu", "cuda"):
        assert environment(EngineSection(), device, "m", 1, inherited)["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "false"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_convolutions_are_kept_as_the_engine_computes(dtype: str) -> None:
    section = EngineSection.model_validate({"dtype": dtype})
    for device in ("cpu", "cuda"):
        assert environment(section, device, "m", 1, {})["SGLANG_MAMBA_CONV_DTYPE"] == dtype


def test_an_engine_on_a_cpu_sees_no_gpu(tmp_path: Path) -> None:
    visible = {"CUDA_VISIBLE_DEVICES": "2"}
    assert environment(EngineSection(), "cpu", str(tmp_path), 30000, visible)["CUDA_VISIBLE_DEVICES"] == ""
    assert environment(EngineSection(), "cuda", str(tmp_path), 30000, visible)["CUDA_VISIBLE_DEVICES"] == "2"
