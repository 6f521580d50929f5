"""The agent service as a process, with real environments and rollout services, a real queue and fake engines."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from penstock.broker import Stage
from penstock.broker.embedded import EmbeddedServer
from penstock.contracts import Score, ServiceKind
from tests.integration.agent.agent_world import Run, fake_engines, running
from tests.patience import ANSWER_SECONDS, START_SECONDS

CLIENT = """
import asyncio, json, os, sys, urllib.request


def play(row, base_url, api_key):
    assert row["answer"] == "7", row
    question = {"model": "m", "messages": [{"role": "user", "content": "a="}]}
    for method, path, body in (("POST", "/chat/completions", question), ("PUT", "/reward", {"reward": 1.5})):
        headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
        request = urllib.request.Request(base_url + path, json.dumps(body).encode(), headers, method=method)
        urllib.request.urlopen(request, timeout=60).read()


async def run(row, base_url, api_key):
    await asyncio.to_thread(play, row, base_url, api_key)


if __name__ == "__main__":
    play(json.load(sys.stdin), os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"])
"""

pytestmark = [pytest.mark.redis, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.rollout.fake_model.VOCABULARY", 43)  # the tiny model's


async def started(run: Run, urls: list[str], name: str = "agent0") -> asyncio.subprocess.Process:
    """The engines' services and one agent service, which answers."""
    if urls:
        await run.start_engines(*urls)
    process = await run.start("agent", name)
    await run.records(ServiceKind.AGENT, 1)
    return process


async def test_it_makes_groups_of_episodes_and_a_fault_costs_only_its_own(
    tmp_path: Path, tiny_model: Path, redis_server: EmbeddedServer
) -> None:
    limits = {"max_attempts": 2, "call_timeout_seconds": 3.0}
    async with fake_engines(2) as (_, urls), running(tmp_path, tiny_model, redis_server, **limits) as run:
        process = await started(run, urls)
        [record] = await run.records(ServiceKind.AGENT, 1, lambda state: state == "ready")
        assert record.pid == process.pid
        await run.queue.client.xadd(run.queue.keys.stream(Stage.TICKETS), {"t": "7", "a": "0", "p": b"\xc1"})
        faults: tuple[dict[str, Any], ...] = ({"fails": "always"}, {"score": "nan"}, {"score": "none"}, {"free": 0})
        faulty = [run.ticket(number, metadata=fault) for number, fault in enumerate(faults, start=2)]
        await run.issue(run.ticket(0), run.ticket(1), *faulty, run.ticket(0, purpose="eval"))
        groups = await run.groups(7)
        for key in ("0", "1", "e0"):
            assert (groups[key].server, groups[key].completions) == (record.name, ())
            for episode in groups[key].episodes:
                assert (episode.score, episode.end, episode.counts.num_turns) == (Score(3.0), "done", 3)
                assert episode.counts.branches == {}
                assert [node.is_sampled for node in episode.nodes] == [False, True] * 3
                assert episode.leaves == [5]
                assert {span.policy.number for span in episode.spans} == {0}
        assert groups["e0"].episodes[0].text.count("+=") >= 2, "the environment's texts are not in the transcript"
        for key, expected in zip("2345", ("the sandbox is away", "nan", "none", "call_timeout_seconds"), strict=True):
            for episode in groups[key].episodes:
                assert (episode.end, episode.nodes) == ("timeout" if key == "5" else "failure", ())
                assert expected in episode.score.failure.lower(), episode.score.failure
                assert episode.counts.num_attempts == 2
        assert (await run.queue.depths())["dead"] == 1
        async with httpx.AsyncClient(base_url=record.url) as http:
            assert (await http.get("/ready")).status_code == 200
            metrics = (await http.get("/metrics")).text
        assert 'penstock_agent_episodes_total{end="done"} 6.0' in metrics
        assert 'penstock_agent_failures_total{kind="failure"} 12.0' in metrics
        assert 'penstock_agent_failures_total{kind="timeout"} 4.0' in metrics
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), START_SECONDS) == 0, run.logs()
        assert await run.records(ServiceKind.AGENT, 0) == []


async def test_what_is_finished_is_never_made_again(
    tmp_path: Path, tiny_model: Path, redis_server: EmbeddedServer
) -> None:
    """One service is killed, the next one is stopped; both leave nothing behind but the finished episodes."""
    async with fake_engines(1) as (_, urls), running(tmp_path, tiny_model, redis_server) as run:
        first = await started(run, urls)
        await run.issue(run.ticket(0, group_size=4, metadata={"free": 2}))
        await run.until_kept(2)
        await run.until_begun(4)
        children = psutil.Process(first.pid).children(recursive=True)
        assert len(children) >= 2
        first.kill()
        await first.wait()
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=ANSWER_SECONDS)
        assert not alive, "environments outlive their service"

        second = await run.start("agent", "agent1")
        await run.until_begun(6)
        children = psutil.Process(second.pid).children(recursive=True)
        second.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(second.wait(), START_SECONDS) == 0, run.logs()
        assert not [each for each in children if each.is_running()]

        (tmp_path / "gate").touch()
        await run.start("agent", "agent2")
        group = await run.group()
        assert [episode.score for episode in group.episodes] == [Score(3.0)] * 4
        assert run.num_begun == 8, "a finished episode was made again"
        await run.until_kept(0)


async def test_an_outage_is_waited_for(tmp_path: Path, tiny_model: Path, redis_server: EmbeddedServer) -> None:
    """First of all engines, then of one, then of what the environment needs."""
    limits = {"timeout_seconds": 30, "max_attempts": 100}
    async with fake_engines(2) as (fakes, urls), running(tmp_path, tiny_model, redis_server, **limits) as run:
        process = await run.start("agent", "agent0")
        [record] = await run.records(ServiceKind.AGENT, 1)
        async with httpx.AsyncClient(base_url=record.url) as http:
            assert (await http.get("/ready")).status_code == 503
        await run.trainer.issue([run.ticket(0)])
        await run.until_begun(2)
        await run.records(ServiceKind.AGENT, 1, lambda state: "no rollout server is registered" in state)
        await asyncio.sleep(limits["timeout_seconds"])
        assert run.num_begun == 2, "time without a server counted"
        await run.start_engines(*urls)
        assert [episode.counts.num_attempts for episode in (await run.group()).episodes] == [1, 1]

        for fake in fakes:
            fake.token_seconds = 0.05
            fake.running.clear()
        await run.issue(*(run.ticket(number) for number in range(1, 7)))
        await asyncio.wait_for(fakes[0].running.wait(), ANSWER_SECONDS)
        await run.kill_one("rollout0")
        groups = await run.groups(6)
        assert all(episode.score == Score(3.0) for group in groups.values() for episode in group.episodes)
        assert run.num_begun == 14, "an episode was made again for a server that went away"

        await run.issue(*(run.ticket(number, metadata={"fails": "works"}) for number in range(7, 15)))
        [record] = await run.records(ServiceKind.AGENT, 1, lambda state: state.startswith("the environment fails"))
        assert "the sandbox is away" in record.state
        begun = run.num_begun
        (tmp_path / "works").touch()
        groups = await run.groups(8)
        assert all(episode.score == Score(3.0) for group in groups.values() for episode in group.episodes)
        assert begun < 14 + 60, "the outage used up attempts"
        assert process.returncode is None


@pytest.mark.parametrize("agent", [{"command": ["python", "client.py"]}, {"environment": "client:run"}])
async def test_an_agent_of_its_own_speaks_http(
    tmp_path: Path, tiny_model: Path, redis_server: EmbeddedServer, agent: dict[str, Any]
) -> None:
    (tmp_path / "client.py").write_text(CLIENT)
    async with fake_engines(1) as (_, urls), running(tmp_path, tiny_model, redis_server, **agent) as run:
        await started(run, urls)
        await run.issue(run.ticket(0))
        for episode in (await run.group()).episodes:
            assert episode.score == Score(1.5), episode
            assert (episode.counts.num_turns, episode.num_tokens) == (1, 4)


async def test_what_the_user_must_change_ends_it_with_code_2(
    tmp_path: Path, tiny_model: Path, redis_server: EmbeddedServer
) -> None:
    async with running(tmp_path, tiny_model, redis_server, environment="envs:Missing") as run:
        process = await run.start("agent", "agent0")
        assert await asyncio.wait_for(process.wait(), START_SECONDS) == 2, run.logs()
        assert "agent: config: agent.environment" in (tmp_path / "agent0.log").read_text()
