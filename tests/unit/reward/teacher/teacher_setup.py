"""A server of a teacher without a model, behind real HTTP: log p depends on a token and all those before it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from penstock.config import TeacherSection
from penstock.runtime.service import Service
from penstock_reward.metrics import RewardMetrics
from penstock_reward.teacher.teacher import Teacher, make_teacher
from tests.patience import ANSWER_SECONDS

Fault = Callable[[list[list[int]]], Awaitable[Response | None]]
"""Answers a request for these sequences in place of the server; None: it does not."""


def logprob(sequence: Sequence[int], place: int) -> float:
    """What the fake answers for the token at this place: another number if any token before it is another one."""
    return -(1 + sum((index + 1) * token for index, token in enumerate(sequence[: place + 1])) % 997) / 64


class FakeTeacher:
    """Answers as SGLang does. asked: the sequences of each request, with their starts; probes apart."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[list[int], int]]] = []
        self.num_probes = 0
        self.num_running = 0
        self.most_running = 0
        self.fault: Fault | None = None
        self.longest = 100
        self.texts = ["<unk>"]
        self.num_embeddings = 0
        self.is_full = False
        self.url = ""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.post("/generate")(self.generate)
        app.post("/detokenize")(self.detokenize)
        app.get("/server_info")(self.server_info)
        app.get("/model_info")(lambda: {"model_path": "large"})
        app.get("/v1/models")(lambda: {"data": [{"max_model_len": self.longest}]})
        return app

    def server_info(self) -> Response:
        if self.is_full:
            return Response("the queue is full", 503)
        return JSONResponse({"max_total_num_tokens": 65536, "page_size": 1, "version": "0"})

    async def detokenize(self, request: Request) -> dict[str, Any]:
        return {"text": [self.texts[token] for (token,) in (await request.json())["tokens"]]}

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        wanted = body.get("token_ids_logprob")
        if wanted is not None:
            fits = wanted[0] < (self.num_embeddings or len(self.texts))
            return JSONResponse([{}]) if fits else JSONResponse({"error": "out-of-vocabulary token id"}, 400)
        sequences, starts = body["input_ids"], body["logprob_start_len"]
        assert body["return_logprob"]
        assert body["sampling_params"] == {"max_new_tokens": 0}
        if is_probe := sequences == [[0, 0]]:
            self.num_probes += 1
        else:
            self.asked.append(list(zip(sequences, starts, strict=True)))
        self.num_running += 0 if is_probe else len(sequences)
        self.most_running = max(self.num_running, self.most_running)
        try:
            if self.fault is not None and (answer := await self.fault(sequences)) is not None:
                return answer
        finally:
            self.num_running -= 0 if is_probe else len(sequences)
        if any(len(each) > self.longest for each in sequences):
            return JSONResponse({"error": f"longer than {self.longest} tokens"}, 400)
        return Response(json.dumps([_item(*each) for each in zip(sequences, starts, strict=True)]))


def _item(sequence: list[int], start: int) -> dict[str, Any]:
    """SGLang leaves the first log-probability out, since it has not computed what is before it."""
    pairs = [
        [logprob(sequence, place) if place > start else None, sequence[place], None]
        for place in range(start, len(sequence))
    ]
    return {"text": "", "meta_info": {"input_token_logprobs": pairs}}


@contextlib.asynccontextmanager
async def serving(fake: FakeTeacher) -> AsyncIterator[FakeTeacher]:
    """The fake at an address of its own."""
    service = Service("127.0.0.1", 0, "teacher.port")
    fake.url = service.url
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(service.run(fake.app(), until=_until(service.stop)))
        try:
            yield fake
        finally:
            service.stop.set()


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


def teacher_of(*urls: str, metrics: RewardMetrics | None = None, **section: Any) -> Teacher:
    """The teacher of servers at these addresses."""
    values = {"timeout_seconds": ANSWER_SECONDS, **section}
    found = make_teacher(TeacherSection(urls=urls, **values), metrics or RewardMetrics())
    assert found is not None
    return found


@contextlib.asynccontextmanager
async def answering(teacher: Teacher) -> AsyncIterator[Teacher]:
    """The teacher while its servers are probed, as in the service."""
    probing = asyncio.create_task(teacher.servers.keep_probing())
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            yield teacher
    finally:
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)
        await teacher.servers.close()
