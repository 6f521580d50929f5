"""Every transport to two real SGLang servers, with and without faults; skipped if SGLang's environment is missing.

The test that kills and freezes the servers starts them again. What each serves is measured: its greedy
log-probabilities are compared with those of the model that was pushed.
"""

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.push_setup import ModelSource, RolloutServer, pusher
from penstock.contracts import Sampling, pack_int32, unpack_float32, unpack_int32
from penstock.contracts.services import Announcement
from penstock.runtime.process import descendants, kill_all
from penstock_rollout.engine.types import completions
from penstock_trainer.model.loading import load_model
from penstock_trainer.torchrun import torchrun_arguments
from tests.integration.rollout.sglang_pair import DEADLINE_SECONDS, PYTHON, all_up, pair_config, scheduler_of
from tests.patience import ANSWER_SECONDS, START_SECONDS
from tests.tolerance import logprob_tolerance
from tests.unit.rollout.one_request import generate

WORKER = Path(__file__).with_name("push_worker.py")
GREEDY = Sampling(0.0, 12, ())
PROMPTS = ([5, 6, 7], [20, 21, 22, 23, 24])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with SGLang: `make envs` makes one"),
]


@dataclass
class World:
    """Two servers, and a model whose weights are pushed to them."""

    servers: list[RolloutServer]
    source: ModelSource
    model_path: Path
    folder: Path
    lease: int = 0

    def take_over(self) -> None:
        """Be the next trainer: the servers are those of the session, and have followed others."""
        self.lease = max(self.lease, *(server.weights.lease for server in self.servers)) + 1

    def pusher(self, transport: str) -> Any:
        self.take_over()
        config = pair_config(self.model_path, self.folder, transport)
        return pusher(config, self.source, self.servers, self.folder, lease=self.lease)

    def train(self) -> None:
        """Other weights, which sample other tokens."""
        with torch.no_grad():
            for weight in self.source.masters.values():
                weight.add_(torch.randn_like(weight) * 0.1)


@pytest.fixture(scope="module")
def world(
    sglang_pair: list[RolloutServer], sglang_models: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> World:
    torch.manual_seed(7)
    model = sglang_models[0]
    source = ModelSource(load_model(str(model), "actor.path"))
    return World(sglang_pair, source, model, tmp_path_factory.mktemp("transports"))


async def assert_serves(world: World, server: RolloutServer, announcement: Announcement) -> None:
    """Check that it reports the version, and that its tokens have the model's log-probabilities."""
    assert server.weights.identity == announcement.identity
    for prompt in PROMPTS:
        answer = await generate(server.engine, pack_int32(prompt), (1,), GREEDY)
        (completion,) = completions(answer, server.weights.known)
        assert [span.policy for span in completion.spans] == [announcement.identity]
        tokens = unpack_int32(completion.token_ids)
        with torch.no_grad():
            logits = world.source.model(torch.tensor([prompt + tokens])).logits[0].float()
        expected = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert unpack_float32(completion.logprobs) == pytest.approx(
            expected.tolist(), abs=logprob_tolerance(world.source.model, len(prompt) + len(tokens))
        )


@pytest.mark.parametrize("transport", ["disk", "nccl", "tensor"])
async def test_both_servers_serve_what_was_pushed(world: World, transport: str) -> None:
    async with world.pusher(transport) as pushing:
        for _ in range(2):
            world.train()
            push = await pushing.push()
            assert (push.live, push.fenced) == (("first", "second"), {})
            assert 0 < push.paused_seconds <= push.seconds
            for server in world.servers:
                await assert_serves(world, server, pushing.announcement)


def spoil_files(folder: str) -> None:
    """Write other bytes into files that look unchanged."""
    for path in Path(folder).glob("*.safetensors"):
        before = path.stat()
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_an_engine_serves_what_it_has_prefetched(world: World) -> None:
    """It does not serve what the file holds at the update: by then the file has been read."""
    server, tokens = world.servers[0], [*PROMPTS[0], *PROMPTS[1]]
    client = server.engine.client
    async with world.pusher("disk") as pushing:
        await pushing.push()
        world.train()
        announcement = await pushing.stage()
        folder, version = Path(announcement.path), str(announcement.identity)
        await client.loading.prefetch(folder, ANSWER_SECONDS)
        spoil_files(announcement.path)
        await client.generation.pause("retract", ANSWER_SECONDS)
        await client.loading.load(folder, version, ANSWER_SECONDS)
        await client.generation.drop_prefixes(version, flush=True)
        await client.generation.resume()
        with torch.no_grad():
            logits = world.source.model(torch.tensor([tokens])).logits[0].float()
        expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert await client.generation.prompt_logprobs(tokens, ANSWER_SECONDS) == pytest.approx(
            expected.tolist(), abs=logprob_tolerance(world.source.model, len(tokens))
        )


async def test_two_ranks_under_torchrun_broadcast_to_a_server(world: World) -> None:
    """The trainer's rank 0 is also rank 0 of the servers' groups."""
    world.take_over()
    server = world.servers[0]
    arguments = [str(WORKER), str(world.model_path), str(world.folder), server.url, str(world.lease)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "torch.distributed.run", *torchrun_arguments(2), *arguments),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), START_SECONDS)
    finally:
        kill_all(descendants(process.pid), grace_seconds=1)
    assert process.returncode == 0, output.decode()
    trained = load_model(str(world.folder / "trained"), "actor.path")
    for weight, new in zip(world.source.masters.values(), ModelSource(trained).masters.values(), strict=True):
        assert not torch.equal(weight, new)
        weight.copy_(new)
    assert server.weights.identity is not None
    await assert_serves(world, server, Announcement(server.weights.identity, "", world.lease))
    assert server.weights.identity.number == 2


async def test_a_frozen_or_killed_peer_is_fenced_and_started_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = world.servers
    starts = [server.engine.life for server in world.servers]
    async with world.pusher("nccl") as pushing:
        world.train()
        assert (await pushing.push()).live == ("first", "second")

        scheduler_of(first).send_signal(signal.SIGSTOP)
        world.train()
        push = await pushing.push()
        assert push.live == ("second",)
        assert "weights.push_timeout_seconds" in push.fenced["first"] or "HTTP 504" in push.fenced["first"]
        await assert_serves(world, second, pushing.announcement)
        await not_serving(first)

        peer = scheduler_of(second)
        peer.send_signal(signal.SIGSTOP)  # so that it dies within the broadcast
        world.train()
        pushed = asyncio.create_task(pushing.push())
        await sending(second)
        peer.kill()
        push = await pushed
        assert push.live == ()
        assert list(push.fenced)[-1] == "second"
        assert "weights.push_timeout_seconds" not in push.fenced["second"]  # no one waited for the deadline
        assert "no rollout server serves" in caplog.text
        await not_serving(second)

        await all_up(world.servers)
        assert [server.engine.life for server in world.servers] == [each + 1 for each in starts]
        files = await asyncio.to_thread(pushing.transport.snapshot)
        for server in world.servers:  # as the producer does when it is behind
            assert server.weights.identity is None
            await server.weights.update(files)
            await assert_serves(world, server, files)

        world.train()
        assert (await pushing.push()).live == ("first", "second")  # through new groups
        for server in world.servers:
            await assert_serves(world, server, pushing.announcement)


async def not_serving(server: RolloutServer) -> None:
    """Wait until the server's engine is given up; check that the server has no weights for tickets then."""
    async with asyncio.timeout(DEADLINE_SECONDS + ANSWER_SECONDS):
        while server.engine.up.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert server.weights.identity is None


async def sending(server: RolloutServer) -> None:
    """Wait until a push has paused the server's generation, and its engine is about to receive."""
    async with asyncio.timeout(ANSWER_SECONDS):
        while server.weights.state != "updating":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
