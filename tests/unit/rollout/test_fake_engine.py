"""A small server that speaks SGLang's protocol: completions are a pure function of prompt and seed.

With it, the rollout service's client, weights and producer are tested over real HTTP without a model. The tests here
state what other tests may rely on.
"""

import asyncio
import base64
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvicorn
import xxhash
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from penstock.contracts import pack_int32
from penstock.weights.manifest import MANIFEST_NAME, Manifest, TensorEntry, identity_digest
from tests.unit.rollout.engine_gates import Gates
from tests.unit.rollout.fake_model import next_token, prompt_logprobs, token_logprob


class FakeSGLang(Gates):
    """State and switches of the fake: set an attribute to make it fail, close a gate to make it wait."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_version = "default"
        self.context_length = 64
        self.cache_tokens = 4096
        self.most_tokens = 10**6  # of a completion, whatever is asked for
        self.model_path = ""
        self.token_seconds = 0.0
        self.load_seconds = self.pass_seconds = self.join_seconds = 0.0
        self.fail_load = ""
        self.lie_about_version = False
        self.sticks_to = ""  # it keeps this version's weights, whatever version it reports as loaded
        self.reports_spans = True
        self.cached_tokens = 0
        self.finish_reason = "length"
        self.answer: Any = None
        self.die_on_generate = False
        self.dies_of_seed = -1
        self.calls: list[tuple[str, Any]] = []
        self.num_running = 0
        self.max_running = 0
        self.running = asyncio.Event()
        self.server: uvicorn.Server | None = None
        self.given_up: set[str] = set()  # tags of the GPU memory that it has given up
        self.faults: list[str] = []  # calls of which SGLang ends
        self.on_memory: Callable[[bool], None] = lambda has: None

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def require(self, condition: bool, fault: str) -> None:
        if not condition:
            self.faults.append(fault)

    def start(self) -> None:
        """It begins anew, with all its memory."""
        self.given_up.clear()
        self.weight_version = "default"
        self.going_on.set()
        self.on_memory(True)

    def end(self) -> None:
        """Its process ends."""
        self.break_connections()
        self.on_memory(False)

    def break_connections(self) -> None:
        assert self.server is not None
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()

    async def complete(
        self, prompt: list[int], params: dict[str, Any], *, with_experts: bool = False
    ) -> dict[str, Any]:
        tokens: list[int] = []
        versions: list[str] = []
        logprobs: list[list[Any]] = []
        began_at, finish_reason = self.num_aborts, self.finish_reason
        for position in range(min(params["max_new_tokens"], self.most_tokens)):
            await self.held(position, began_at)
            await self.going_on.wait()
            await asyncio.sleep(self.token_seconds)
            await self.going_on.wait()
            self.require(not self.given_up, "it generates without its memory")
            if self.num_aborts > began_at or (finish_reason == "abort" and len(tokens) == 1):
                finish_reason = "abort"
                break
            tokens.append(next_token(prompt + tokens, params["sampling_seed"]))
            versions.append(self.weight_version)
            logprobs.append([token_logprob(tokens[-1], self.sticks_to or self.weight_version), tokens[-1], None])
        spans: list[dict[str, Any]] = []
        for start, version in enumerate(versions):
            if spans and spans[-1]["version"] == version:
                spans[-1]["end"] = start + 1
            else:
                spans.append({"version": version, "start": start, "end": start + 1})
        return {
            "text": " ".join(map(str, tokens)),
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": finish_reason},
                "weight_version": self.weight_version,
                "weight_versions": spans if self.reports_spans else None,
                "cached_tokens": self.cached_tokens,
                "output_token_logprobs": logprobs,
                **({"routed_experts": encoded_experts([*prompt, *tokens][:-1])} if with_experts and tokens else {}),
            },
        }


def experts_of(tokens: Sequence[int]) -> list[int]:
    """Of each token, in two layers of three experts each; they depend on the tokens alone."""
    return [(token * 7 + place) % 300 for token in tokens for place in range(6)]


def encoded_experts(tokens: Sequence[int]) -> str:
    """As SGLang answers them."""
    return base64.b64encode(pack_int32(experts_of(tokens))).decode()


def make_fake_app(fake: FakeSGLang) -> FastAPI:
    app = FastAPI()

    async def body_of(request: Request) -> Any:
        raw = await request.body()
        body = await request.json() if raw else None
        fake.calls.append((request.url.path, body))
        return body

    @app.get("/server_info")
    async def server_info() -> Any:
        tokens = {"max_total_num_tokens": fake.cache_tokens, "page_size": 1}
        return {"version": "0.5.21", "device": "cuda", "tp_size": 1, **tokens}

    @app.get("/model_info")
    async def model_info() -> Any:
        version = "another" if fake.lie_about_version else fake.weight_version
        return {"model_path": fake.model_path, "weight_version": version}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"data": [{"max_model_len": fake.context_length}]}

    @app.post("/generate")
    async def generate(request: Request) -> Any:
        body = await body_of(request)
        if body.get("logprob_start_len") == 0:
            await fake.going_on.wait()
            await fake.may_probe.wait()
            said = prompt_logprobs(body["input_ids"], fake.sticks_to or fake.weight_version)
            told = [[logprob, token, None] for logprob, token in zip([None, *said], body["input_ids"], strict=True)]
            return {"text": "", "output_ids": [], "meta_info": {"input_token_logprobs": told}}
        if not isinstance(body["sampling_params"], list):
            return {"text": "", "output_ids": [], "meta_info": {}}
        if fake.die_on_generate or fake.dies_of_seed in [each["sampling_seed"] for each in body["sampling_params"]]:
            fake.break_connections()
        if fake.answer is not None:
            return fake.answer
        if len(body["input_ids"][0]) + body["sampling_params"][0]["max_new_tokens"] > fake.context_length:
            return JSONResponse({"error": {"message": "too long"}}, status_code=400)
        fake.num_running += len(body["input_ids"])
        fake.max_running = max(fake.max_running, fake.num_running)
        fake.running.set()
        try:
            pairs = zip(body["input_ids"], body["sampling_params"], strict=True)
            asked = {"with_experts": bool(body.get("return_routed_experts"))}
            return await asyncio.gather(*(fake.complete(prompt, params, **asked) for prompt, params in pairs))
        finally:
            fake.num_running -= len(body["input_ids"])

    @app.post("/pause_generation")
    async def pause(request: Request) -> Any:
        if (await body_of(request))["mode"] == "abort":
            fake.num_aborts += 1
        fake.going_on.clear()
        return {}

    @app.post("/set_internal_state")
    async def set_state(request: Request) -> Any:
        assert await body_of(request) == {"server_args": {}}
        await asyncio.sleep(fake.pass_seconds)
        return [True]

    @app.post("/abort_request")
    async def abort(request: Request) -> Any:
        await body_of(request)
        fake.num_aborts += 1
        return {}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Any:
        return {"text": [" ".join(map(str, tokens)) for tokens in (await body_of(request))["tokens"]]}

    @app.post("/continue_generation")
    async def resume(request: Request) -> Any:
        await body_of(request)
        fake.going_on.set()
        return {}

    @app.post("/update_weights_from_disk")
    async def load(request: Request) -> Any:
        body = await body_of(request)
        await asyncio.sleep(fake.load_seconds)
        await fake.may_load.wait()
        fake.require("weights" not in fake.given_up, "it loads weights without their memory")
        if fake.fail_load:
            return JSONResponse({"success": False, "message": fake.fail_load}, status_code=400)
        fake.weight_version = body["weight_version"]
        return {"success": True, "message": ""}

    @app.post("/release_memory_occupation")
    async def give_up(request: Request) -> Any:
        tags = set((await body_of(request))["tags"])
        fake.require(not fake.going_on.is_set(), "it gives memory up while it is not paused")
        await fake.may_give_up.wait()
        fake.require(not tags & fake.given_up, f"it gives up {tags & fake.given_up}, which it has not")
        fake.given_up |= tags
        fake.weight_version = "lost"
        fake.on_memory(False)
        return None

    @app.post("/resume_memory_occupation")
    async def take_memory(request: Request) -> Any:
        tags = set((await body_of(request))["tags"])
        fake.require(tags <= fake.given_up, f"it takes {tags - fake.given_up}, which it has")
        fake.on_memory(True)
        fake.given_up -= tags
        return None

    @app.post("/init_weights_update_group")
    async def join_group(request: Request) -> Any:
        await body_of(request)
        await asyncio.sleep(fake.join_seconds)
        return {"success": True, "message": ""}

    @app.post("/destroy_weights_update_group")
    @app.post("/begin_weight_update")
    @app.post("/end_weight_update")
    async def succeed(request: Request) -> Any:
        await body_of(request)
        return {"success": True, "message": ""}

    @app.post("/update_weights_from_distributed")
    @app.post("/update_weights_from_tensor")
    async def receive(request: Request) -> Any:
        body = await body_of(request)
        await asyncio.sleep(fake.load_seconds)
        await fake.may_load.wait()
        if fake.fail_load:
            return JSONResponse({"success": False, "message": fake.fail_load}, status_code=400)
        if body["weight_version"] is not None:
            fake.weight_version = body["weight_version"]
        return {"success": True, "message": ""}

    @app.post("/flush_cache")
    async def flush(request: Request) -> Any:
        await body_of(request)
        return {}

    @app.post("/freeze_gc")
    async def freeze_gc() -> Any:
        return {}

    return app


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def serving(fake: FakeSGLang) -> AsyncIterator[str]:
    """The URL of the fake, while it serves."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    bound.listen()
    fake.server = _QuietServer(
        uvicorn.Config(
            make_fake_app(fake), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
    )
    task = asyncio.create_task(fake.server.serve(sockets=[bound]))
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        fake.open()
        fake.break_connections()
        fake.server.should_exit = fake.server.force_exit = True
        await task
        bound.close()


class FakeServer:
    """An `EngineServer` for the fake: a start makes it work again, `die` ends it."""

    restartable = True

    def __init__(self, fake: FakeSGLang, url: str) -> None:
        self.url = url
        self.num_starts = 0
        self._fake = fake
        self._died = asyncio.Event()

    async def start(self) -> None:
        self.num_starts += 1
        self._died.clear()
        self._fake.die_on_generate = False
        self._fake.fail_load = ""
        self._fake.start()
        await self._fake.may_start.wait()

    async def died(self) -> str:
        await self._died.wait()
        return "it was told to"

    async def stop(self) -> None:
        self._fake.end()

    def die(self) -> None:
        self._fake.end()
        self._died.set()


def stage_weights(root: Path, version: int, content: bytes = b"") -> tuple[str, str]:
    """A folder with staged weights of one tensor, and their digest."""
    data = (content or f"weights {version}".encode()).ljust(16, b".")[:16]
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    folder = root / f"v{version}"
    folder.mkdir(parents=True, exist_ok=True)
    file = struct.pack("<Q", len(header)) + header + data
    (folder / "model.safetensors").write_bytes(file)
    entry = TensorEntry("model.safetensors", "F32", (4,), xxhash.xxh3_64_hexdigest(data))
    digest = identity_digest({"w": entry.digest})
    manifest = Manifest(version, 1, digest, "float32", {"model.safetensors": len(file)}, {"w": entry})
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    return str(folder), digest


async def test_it_answers_like_sglang() -> None:
    fake = FakeSGLang()
    async with serving(fake) as url, httpx.AsyncClient(base_url=url) as client:
        params = {"max_new_tokens": 3, "sampling_seed": 1}
        body = {"input_ids": [[1, 2]] * 2, "sampling_params": [params, {**params, "sampling_seed": 2}]}
        first, second = (await client.post("/generate", json=body)).json()
        again = (await client.post("/generate", json=body)).json()
    assert [first, second] == again
    assert first["output_ids"] != second["output_ids"]
    assert first["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 3}]
