"""Random agents: whatever they do, what is recorded is what engines were sent and what they returned.

The agents speak HTTP to the app itself, so that a connection breaks exactly when the example says.
"""

import asyncio
import json
from typing import Any, Literal

from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from penstock_agent.gateway.session import Session
from tests.patience import ANSWER_SECONDS
from tests.unit.agent.gateway.pretend import TOOL, CallCounts, PretendGateway, check_record

Lost = Literal["no", "request", "answer"]
"""request: the client leaves while the model samples. answer: it leaves before the last byte."""


class Client:
    """A connection to the app. `leave` ends it: nothing more is read."""

    def __init__(self, app: FastAPI, key: str) -> None:
        self._app = app
        self._key = key

    async def ask(
        self, body: dict[str, Any], headers: dict[str, str], lost: Lost, leave: asyncio.Event
    ) -> tuple[int, bytes] | None:
        """Status and body; None if the client has left."""
        named = {"authorization": f"Bearer {self._key}", "content-type": "application/json", **headers}
        scope: Any = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("t", 80),
            "client": ("c", 1),
        }
        requests = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        sent: list[Any] = []
        complete = False

        async def receive() -> Any:
            if requests:
                return requests.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal complete
            if not leave.is_set():
                sent.append(message)
                complete = message["type"] == "http.response.body" and not message.get("more_body")
            if lost == "answer" and message["type"] == "http.response.body":
                leave.set()

        async with asyncio.timeout(ANSWER_SECONDS):
            await self._app(scope, receive, send)
        if not complete:
            return None
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


class Agent:
    """An agent that keeps its histories, and changes them as a test says."""

    def __init__(self, gateway: PretendGateway, session: Session) -> None:
        self._gateway = gateway
        self._client = Client(gateway.app, session.key)
        self.histories: list[list[dict[str, Any]]] = [[{"role": "system", "content": "s"}, _user("0")]]
        self.tools: list[Any] = []
        self.read: list[str] = []
        self._num_said = 0

    async def act(self, action: str, which: int) -> None:
        """One action on one of the agent's conversations."""
        history = self.histories[which % len(self.histories)]
        if action == "edit" and len(history) > 2:
            changed = history[which % len(history)]
            history[which % len(history)] = {**changed, "content": f"{changed['content']}!"}
        elif action == "compact" and len(history) > 3:
            self.histories.append([history[0], _user("in short"), history[-1]])
        elif action == "branch":
            self.histories.append(history[: 2 + which % len(history)])
        elif action == "tools":
            self.tools = [] if self.tools else [TOOL]
        elif action == "parallel":
            others = [*self.histories, history]  # one of them is asked twice at once
            await asyncio.gather(*(self._say(each, "no", "") for each in others[-3:]))
        elif action in ("lose the request", "lose the answer"):
            await self._say(
                history, "request" if action == "lose the request" else "answer", "retry" if which % 2 else ""
            )
        elif action == "name":
            await self._say(history, "answer" if which % 2 else "no", "idempotency")
        else:
            await self._say(history, "no", "stream" if which % 3 == 0 else "")

    async def _say(self, history: list[dict[str, Any]], lost: Lost, how: str) -> None:
        """Ask for the next message, again if it is lost, and read it."""
        asked = list(history)
        if asked[-1]["role"] == "assistant":
            self._num_said += 1
            asked.append(_user(str(self._num_said)))
        body = {"messages": asked, "tools": self.tools, "stream": how == "stream"}
        headers = {"idempotency-key": f"k{self._num_said}-{len(self.read)}"} if how == "idempotency" else {}
        num_calls = len(self._gateway.servers.calls)
        answer = await self._once(body, headers, lost)
        if answer is None:
            retried = {"x-stainless-retry-count": "1"} if how == "retry" else {}
            answer = await self._once(body, {**headers, **retried}, "no")
            assert len(self._gateway.servers.calls) <= num_calls + 1, "a retry was generated anew"
        assert answer is not None
        status, data = answer
        assert status == 200, data
        message = _streamed(data) if how == "stream" else json.loads(data)["choices"][0]["message"]
        self.read.append(message["content"])
        history[:] = [*asked, message]

    async def _once(self, body: dict[str, Any], headers: dict[str, str], lost: Lost) -> tuple[int, bytes] | None:
        leave, gate = asyncio.Event(), self._gateway.servers.gate
        if lost != "request":
            return await self._client.ask(body, headers, lost, leave)
        gate.clear()
        asking = asyncio.create_task(self._client.ask(body, headers, lost, leave))
        await asyncio.sleep(0)
        leave.set()
        answer = await asking
        gate.set()
        return answer


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _streamed(data: bytes) -> dict[str, Any]:
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line.startswith("data: {")]
    deltas = [choice["delta"] for line in lines for choice in json.loads(line)["choices"]]
    return {"role": "assistant", "content": "".join(delta.get("content", "") for delta in deltas)}


ACTIONS = (
    "append",
    "append",
    "edit",
    "compact",
    "branch",
    "tools",
    "parallel",
    "lose the request",
    "lose the answer",
    "name",
)


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 20)), min_size=1, max_size=14))
def test_ids_recorded_are_ids_returned_each_exactly_once(actions: list[tuple[str, int]]) -> None:
    async def play() -> None:
        gateway = PretendGateway()
        async with gateway.open() as session:
            agent = Agent(gateway, session)
            for action, which in actions:
                await agent.act(action, which)
        check_record(session, gateway.servers)
        returned = [gateway.servers.reply("", call) for call, _ in gateway.servers.answered]
        assert sorted(agent.read) == sorted(returned)  # each answer was read, once
        assert all(node.is_trained for node in session.nodes() if node.is_sampled)
        counts: CallCounts = gateway.counts
        assert (counts.num_answered, counts.refused) == (len(returned), [])
        assert session.num_turns == session.counts().num_turns == len(returned)

    asyncio.run(play())


@given(st.permutations([0, 0, 1, 2, 3]), st.integers(0, 4))
def test_what_is_sampled_does_not_depend_on_the_order_of_calls(order: list[int], num_parallel: int) -> None:
    async def sampled(numbers: list[int], num_parallel: int) -> list[str]:
        gateway = PretendGateway()
        async with gateway.open() as session:
            client = Client(gateway.app, session.key)
            bodies = [{"messages": [_user(str(number))]} for number in numbers]
            asked = [client.ask(body, {}, "no", asyncio.Event()) for body in bodies]
            await asyncio.gather(*asked[:num_parallel])
            for each in asked[num_parallel:]:
                await each
        return sorted(repr((call.prompt_ids, generated.token_ids)) for call, generated in gateway.servers.answered)

    assert asyncio.run(sampled(order, num_parallel)) == asyncio.run(sampled([0, 0, 1, 2, 3], 0))
