"""A server behind SGLang's HTTP protocol whose completions are a pure function: no model, no batch, no clock.

A token and its log-probability depend only on prompt, sampling seed, position and the bytes of the weights that are
loaded when it is sampled. So a run at max_staleness 0 has one outcome, whichever processes die on the way. Like SGLang
0.5.21 it reports the weights of each span of tokens, ends at stop tokens, holds requests while paused, aborts requests
whose client has gone, and refuses to flush while requests run. It gives its memory up, and ends if it is asked to
generate, to load, or to give memory up again without it.

It is a script of its own, which imports nothing of Penstock. The rollout service starts it in place of SGLang's
interpreter.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import struct
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn

LOAD_SECONDS = 0.05
FAULT = "fault of the caller"  # in its log
CONTEXT_LENGTH = 256
CACHE_TOKENS = 65536
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RefusedError(Exception):
    """What SGLang answers with 400."""


def weights_digest(folder: Path) -> bytes:
    """Digest of the bytes of all weight files in a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.digest()


def _holds_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def sample(weights: bytes, prompt: bytes, seed: int, position: int, vocabulary_size: int) -> tuple[int, float]:
    """The token at a position and its log-probability, near that of a uniform choice."""
    words = hashlib.blake2b(prompt + struct.pack("<Qq", seed, position), key=weights, digest_size=16).digest()
    choice, noise = struct.unpack("<QQ", words)
    return choice % vocabulary_size, -math.log(vocabulary_size) + 0.1 * (noise / 2**64 - 0.5)


class PureEngine:
    """State of the server: the weights, their version and whether generation is paused."""

    def __init__(self, model: Path, token_seconds: float) -> None:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        tokens = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        self.vocabulary_size = int(config["vocab_size"])
        self.letters = {number: text for text, number in tokens.items() if len(text) == 1}
        self.model_path = str(model)
        self.weights = weights_digest(model)
        self.version = "default"
        self.token_seconds = token_seconds
        self.going_on = asyncio.Event()
        self.going_on.set()
        self.num_aborts = 0
        self.num_running = 0
        self.given_up: set[str] = set()

    async def complete(self, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        """One completion, in the form of /generate's response."""
        packed = struct.pack(f"<{len(prompt)}i", *prompt)
        stops, began_at_abort = set(params.get("stop_token_ids") or ()), self.num_aborts
        tokens: list[int] = []
        logprobs: list[list[Any]] = []
        spans: list[dict[str, Any]] = []
        finish = "length"
        while len(tokens) < params["max_new_tokens"]:
            await self.going_on.wait()
            await asyncio.sleep(self.token_seconds)
            await self.going_on.wait()
            self.require(not self.given_up, "it generates without its memory")
            if self.num_aborts != began_at_abort:
                finish = "abort"
                break
            position = len(tokens)
            token, logprob = sample(self.weights, packed, params["sampling_seed"], position, self.vocabulary_size)
            tokens.append(token)
            logprobs.append([logprob, token, None])
            if not spans or spans[-1]["version"] != self.version:
                spans.append({"version": self.version, "start": position, "end": position})
            spans[-1]["end"] = position + 1
            if token in stops:
                finish = "stop"
                break
        return {
            "text": "".join(self.letters.get(token, "") for token in tokens if token not in stops),
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": finish},
                "weight_version": self.version,
                "weight_versions": spans,
                "output_token_logprobs": logprobs,
            },
        }

    async def generate(self, body: dict[str, Any]) -> Any:
        params = body["sampling_params"]
        if not isinstance(params, list):  # the request only fills the prefix cache, and there is none
            return [{"text": "", "output_ids": [], "meta_info": {}} for _ in body["input_ids"]]
        for prompt, each in zip(body["input_ids"], params, strict=True):
            if len(prompt) + each["max_new_tokens"] > CONTEXT_LENGTH:
                raise RefusedError("the request is longer than the context")
            if any(not 0 <= token < self.vocabulary_size for token in prompt):
                sys.exit("a token outside the vocabulary ends SGLang")
        self.num_running += 1
        try:
            pairs = zip(body["input_ids"], params, strict=True)
            return await asyncio.gather(*(self.complete(prompt, each) for prompt, each in pairs))
        finally:
            self.num_running -= 1

    async def pause(self, body: dict[str, Any]) -> Any:
        self.going_on.clear()
        if body["mode"] == "abort":
            self.num_aborts += 1
        return {}

    async def go_on(self, _: dict[str, Any]) -> Any:
        self.going_on.set()
        return {}

    async def load(self, body: dict[str, Any]) -> Any:
        folder = Path(body["model_path"])
        await asyncio.sleep(LOAD_SECONDS)
        self.require("weights" not in self.given_up, "it loads weights without their memory")
        if not await asyncio.to_thread(_holds_weights, folder):
            raise RefusedError(f"no weights in {folder}")
        self.weights, self.version = weights_digest(folder), body["weight_version"]
        self.model_path = str(folder)
        return {"success": True, "message": ""}

    async def give_up(self, body: dict[str, Any]) -> Any:
        tags = set(body["tags"])
        self.require(not self.going_on.is_set(), "it is not paused")
        self.require(not tags & self.given_up, f"it has not {tags & self.given_up}")
        self.given_up |= tags
        if "weights" in tags:
            self.weights, self.version = b"lost", "lost"
        return None

    async def take(self, body: dict[str, Any]) -> Any:
        self.require(self.given_up.issuperset(body["tags"]), f"it has some of {body['tags']}")
        self.given_up -= set(body["tags"])
        return None

    @staticmethod
    def require(condition: bool, fault: str) -> None:
        """End the process, as SGLang's scheduler ends at a call that cannot be."""
        if not condition:
            print(f"{FAULT}: {fault}", flush=True)
            os._exit(1)

    async def flush(self, _: dict[str, Any]) -> Any:
        if self.num_running and self.going_on.is_set():
            raise RefusedError("requests are running")
        return {}

    async def abort(self, _: dict[str, Any]) -> Any:
        self.num_aborts += 1
        return {}

    async def nothing(self, _: dict[str, Any]) -> Any:
        return {}

    async def detokenize(self, body: dict[str, Any]) -> Any:
        return {"text": ["".join(self.letters.get(token, "") for token in tokens) for tokens in body["tokens"]]}

    async def server_info(self, _: dict[str, Any]) -> Any:
        return {"version": "0.5.21", "device": "cpu", "max_total_num_tokens": CACHE_TOKENS}

    async def model_info(self, _: dict[str, Any]) -> Any:
        return {"model_path": self.model_path, "weight_version": self.version}

    async def models(self, _: dict[str, Any]) -> Any:
        return {"data": [{"max_model_len": CONTEXT_LENGTH}]}


class App:
    """The HTTP side: one coroutine per path; a request ends if its client disconnects."""

    def __init__(self, engine: PureEngine) -> None:
        self._calls: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "/generate": engine.generate,
            "/pause_generation": engine.pause,
            "/set_internal_state": engine.nothing,
            "/continue_generation": engine.go_on,
            "/update_weights_from_disk": engine.load,
            "/flush_cache": engine.flush,
            "/release_memory_occupation": engine.give_up,
            "/resume_memory_occupation": engine.take,
            "/abort_request": engine.abort,
            "/detokenize": engine.detokenize,
            "/freeze_gc": engine.nothing,
            "/health": engine.nothing,
            "/server_info": engine.server_info,
            "/model_info": engine.model_info,
            "/v1/models": engine.models,
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        call = self._calls.get(scope["path"])
        if call is None:
            await _answer(send, 404, {"error": f"{scope['path']} is unknown"})
            return
        work = asyncio.ensure_future(call(json.loads(raw) if raw else {}))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return
            try:
                await _answer(send, 200, work.result())
            except RefusedError as error:
                await _answer(send, 400, {"success": False, "message": str(error)})
        finally:
            work.cancel()
            gone.cancel()


async def _answer(send: Send, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def main() -> None:
    """Takes the arguments of `sglang.launch_server`, and ignores those that have no meaning here."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token-seconds", type=float, default=0.0)
    arguments, _ = parser.parse_known_args()

    async def serve() -> None:
        app: Any = App(PureEngine(arguments.model_path, arguments.token_seconds))
        await uvicorn.Server(
            uvicorn.Config(app, port=arguments.port, log_level="warning", lifespan="off", timeout_keep_alive=5)
        ).serve()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
