"""The rollout service with a real SGLang and a tiny random Llama; skipped if SGLang's environment is missing."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.push_setup import ModelSource, RolloutServer
from penstock.config import WeightsSection
from penstock.contracts import PolicyIdentity, Sampling, pack_int32, unpack_float32, unpack_int32
from penstock.contracts.services import Announcement
from penstock.engine_limits import RESERVED_TOKENS
from penstock.errors import EngineRejectedError
from penstock.weights.local_folder import LocalFolder
from penstock.weights.manifest import MANIFEST_NAME, Manifest, TensorEntry, identity_digest
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.engine.types import completions
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.local_copy import LocalCopy
from penstock_rollout.weights.updater import WeightUpdater
from penstock_trainer.weights.deltas import DeltaWriter
from penstock_trainer.weights.files import Format
from penstock_trainer.weights.staging import Staging
from tests.integration.rollout.sglang_pair import PYTHON, VOCABULARY, all_up, scheduler_of
from tests.patience import ANSWER_SECONDS
from tests.tolerance import logprob_tolerance
from tests.unit.rollout.one_request import generate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with SGLang: `make envs` makes one"),
]

Result = tuple[list[int], list[int], list[float]]  # prompt, sampled tokens, their log-probabilities


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(source: ModelSource) -> None:
    """Change the weights as Adam's first step does."""
    with torch.no_grad():
        for weight in source.masters.values():
            weight.add_(0.01 * torch.sign(torch.randn_like(weight)) * (torch.rand_like(weight) < 0.1))


def publish(model: Path, root: Path) -> list[Announcement]:
    """Version 2 in full, then four deltas; the last model also as transformers saves it, in `expected`."""
    source, form = ModelSource(load(model)), Format("float32", "dithered")
    deltas = DeltaWriter(lambda num_bytes: LocalFolder("trainer", num_bytes, str(root / "local")), form, 100)
    staging = Staging(source, root / "weights", form, deltas=deltas)
    torch.manual_seed(0)
    published: list[Announcement] = []
    for version in range(2, 7):
        if published:
            train(source)
        identity = staging.write(version, 1)
        published.append(Announcement(identity, str(staging.folder_of(version, 1)), 1))
    deltas.close()
    source.model.save_pretrained(root / "expected")
    return published


def assert_says(folder: Path, results: list[Result]) -> None:
    """Check that the log-probabilities are those that transformers computes with these weights."""
    model = load(folder)
    for prompt, tokens, said in results:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([prompt + tokens])).logits[0].float(), -1)
        expected = [logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(tokens)]
        assert said == pytest.approx(expected, abs=logprob_tolerance(model, len(prompt) + len(tokens)))


def stage(folder: Path, version: int) -> Announcement:
    """Write the manifest of a model folder."""
    import struct

    import msgspec
    import xxhash

    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        digest = xxhash.xxh3_64_hexdigest(data[8 + length + start : 8 + length + end])
        tensors[name] = TensorEntry("model.safetensors", entry["dtype"], tuple(entry["shape"]), digest)
    digest = identity_digest({name: entry.digest for name, entry in tensors.items()})
    manifest = Manifest(version, 1, digest, "float32", {"model.safetensors": len(data)}, tensors)
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    return Announcement(PolicyIdentity(version, digest), str(folder), 1)


async def assert_nothing_is_cut(engine: Engine) -> None:
    """Up to the longest sequence a completion is full; what SGLang would cut is refused, or is no completion.

    A prompt of all but the last token is what goes on after an abort.
    """
    info = engine.client.info
    assert info.longest_sequence == info.context_length - RESERVED_TOKENS
    for num_new in (1, 10):
        prompt = pack_int32([7] * (info.longest_sequence - num_new))
        (answer,) = await generate(engine, prompt, (1,), Sampling(1.0, num_new, ()))
        assert (len(answer.token_ids), answer.finish_reason) == (num_new, "length")
        with pytest.raises(EngineRejectedError, match="context_length"):
            await generate(engine, prompt, (1,), Sampling(1.0, num_new + 1, ()))
    assert isinstance(engine.client, SGLangClient)
    connection = engine.client.connection
    connection._info = replace(info, longest_sequence=info.context_length)  # as if it were true
    try:
        with pytest.raises(EngineRejectedError, match="cut the completion after 14 tokens"):
            await generate(engine, prompt, (1,), Sampling(1.0, 10 + RESERVED_TOKENS, ()))
    finally:
        connection._info = info


async def test_generation_weights_and_death(
    sglang_pair: list[RolloutServer], sglang_models: tuple[Path, ...], tmp_path: Path
) -> None:
    """One test for all, since a killed engine takes half a minute to start."""
    engine, models = sglang_pair[0].engine, sglang_models[:2]
    life = engine.life
    weights = WeightUpdater(engine, WeightsSection(), RolloutMetrics())
    first, second = (stage(folder, version) for version, folder in enumerate(models))
    await weights.update(first)
    assert engine.client.info.vocabulary_size == VOCABULARY
    prompts, seeds, sampling = ([5, 6, 7], list(range(40, 75))), (1, 2, 3, 4), Sampling(1.0, 12, (1,))

    async def groups(limits: Sampling) -> list[Result]:
        answers = await asyncio.gather(*(generate(engine, pack_int32(prompt), seeds, limits) for prompt in prompts))
        made = [(prompt, completions(each, weights.known)) for prompt, each in zip(prompts, answers, strict=True)]
        return [
            (prompt, unpack_int32(each.token_ids), unpack_float32(each.logprobs))
            for prompt, group in made
            for each in group
        ]

    results = await groups(sampling)
    assert len({tuple(tokens) for _, tokens, _ in results}) == 8
    again = await groups(sampling)
    assert [tokens for _, tokens, _ in again] == [tokens for _, tokens, _ in results]  # seeds are honoured
    assert_says(models[0], results)

    greedy = Sampling(0.0, 6, (1,))
    mixed = await asyncio.gather(groups(greedy), groups(sampling))
    assert [tokens for _, tokens, _ in mixed[1]] == [tokens for _, tokens, _ in results]
    assert len({tuple(tokens) for _, tokens, _ in mixed[0]}) == 2

    running = asyncio.create_task(generate(engine, pack_int32([9, 9]), seeds, Sampling(0.0, 3000, ())))
    await asyncio.sleep(0.5)  # 3000 tokens take several times as long
    await weights.update(second)
    survivors = completions(await running, weights.known)
    assert {each.num_tokens for each in survivors} == {3000}
    spans = [each.spans for each in survivors]
    assert {span.policy for each in spans for span in each} == {first.identity, second.identity}
    results = await groups(sampling)
    assert_says(models[1], results)

    whole, *_, newest = publish(models[1], tmp_path)
    weights.copy = LocalCopy(lambda num_bytes: LocalFolder("rollout", num_bytes, str(tmp_path / "local")))
    await weights.update(whole)
    await weights.update(newest)  # three versions were missed
    results = await groups(sampling)
    assert_says(tmp_path / "expected", results)

    with pytest.raises(EngineRejectedError, match="vocabulary"):
        await generate(engine, pack_int32([VOCABULARY]), (1,), sampling)
    await assert_nothing_is_cut(engine)

    scheduler_of(sglang_pair[0]).kill()
    async with asyncio.timeout(ANSWER_SECONDS):
        while engine.up.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await all_up(sglang_pair[:1])
    assert engine.life == life + 1
