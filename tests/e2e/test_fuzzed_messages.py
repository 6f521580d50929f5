"""Strangers write into the streams of a full run: their messages all end in `dead`, and the services go on."""

import json
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import yaml

from benchmarks.chaos.launch import Launch
from benchmarks.chaos.model import make_tiny_model, write_prompts
from benchmarks.chaos.own_queue import OwnQueue
from benchmarks.chaos.parts import NOTHING, NUM_PROMPTS, ChaosPart, part_config, read_part
from tests.patience import START_SECONDS

pytestmark = pytest.mark.slow

SEED = 11
STREAMS = ("tickets", "eval", "rollouts", "scored")
PARTS = ("completions", "texts")
RUN_SECONDS = 2 * START_SECONDS
PACE_SECONDS = 0.2  # for one completion's reward, until the strangers' messages are in `dead`
PART = ChaosPart("fuzz", NOTHING, num_steps=12, max_staleness=1, deadline_seconds=RUN_SECONDS)
Fields = dict[bytes, bytes]


def fuzzed_fields(rng: random.Random, message: bytes) -> Iterator[Fields]:
    """Entries that hold no message; `message`: a correct one, but of no ticket of this run."""
    name, attempt = b"999999", b"0"
    payloads = [b"", rng.randbytes(1), rng.randbytes(100), rng.randbytes(4_000_000), b"\x91" * 200_000 + b"\x01"]
    payloads += [message[: rng.randrange(1, len(message))] for _ in range(5)]
    payloads += [message.replace(b"/1", b"/9", 1), msgspec.msgpack.encode({"schema": "x"}), msgspec.msgpack.encode(7)]
    payloads += [msgspec.msgpack.encode(changed) for changed in wrong_lengths(msgspec.msgpack.decode(message))]
    for payload in payloads:
        yield {b"t": name, b"a": attempt, b"p": payload}
    yield {b"nothing": b"known"}
    yield {b"t": name, b"a": attempt}
    yield {b"t": rng.randbytes(8), b"a": rng.randbytes(8), b"p": rng.randbytes(8)}
    yield {b"t": b"9" * 400, b"a": b"9" * 400, b"p": b"\x00"}
    yield {b"t": b"-1|x", b"a": b"-1", b"p": message[:9]}


def wrong_lengths(message: dict[str, object]) -> Iterator[dict[str, object]]:
    """The message with arrays that do not fit each other: cut, doubled, of the wrong type."""
    for key, value in message.items():
        if isinstance(value, bytes) and value:
            yield {**message, key: value[:-1]}
        elif isinstance(value, list) and value:
            yield {**message, key: []}
            yield {**message, key: "text"}
        elif isinstance(value, dict):
            yield {**message, key: 7}


def as_of(head: bytes, number: int) -> bytes:
    """The header, with the number of another ticket."""
    message = msgspec.msgpack.decode(head)
    message.get("group", message)["ticket"]["number"] = number
    return msgspec.msgpack.encode(message)


def fuzzed_parts(rng: random.Random, right: Mapping[str, bytes]) -> Iterator[tuple[bytes, dict[str, bytes]]]:
    """Parts, with their names, that do not fit a correct header: missing, wrong, damaged, huge."""
    for name in (b"", b"live", b"../../x", b"0" * 31, b"A" * 32, b"\xff" * 32, rng.randbytes(16).hex().encode()):
        yield name, {}
    for part, data in right.items():
        other = next(right[each] for each in right if each != part)
        for wrong in (b"", data[:-1], other, rng.randbytes(100), rng.randbytes(4_000_000), b"\x91" * 200_000 + b"\x01"):
            yield rng.randbytes(16).hex().encode(), {**right, part: wrong}


def example_parts(client: Any, prefix: str) -> dict[str, bytes]:
    """The parts of one group of the run."""
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline:
        for _, fields in client.xrange(prefix + "rollouts", count=1):
            found = {part: client.get(f"{prefix}part:{fields[b'n'].decode()}:{part}") for part in PARTS}
            if None not in found.values():
                return found
        time.sleep(0.005)
    raise AssertionError("no group was seen with both of its parts")


def example_messages(client: Any, prefix: str) -> dict[str, bytes]:
    """A correct message of each stream, read from the run itself."""
    found: dict[str, bytes] = {}
    deadline = time.monotonic() + RUN_SECONDS
    while found.keys() != {"tickets", "rollouts", "scored"} and time.monotonic() < deadline:
        for stream in ("tickets", "rollouts", "scored"):
            for _, fields in client.xrange(prefix + stream, count=1):
                found.setdefault(stream, fields[b"p"])
        time.sleep(0.005)
    assert found.keys() == {"tickets", "rollouts", "scored"}, f"only {sorted(found)} held a message"
    return {**found, "eval": found["tickets"]}


@pytest.mark.timeout(3 * RUN_SECONDS)
def test_fuzzed_messages_all_end_in_dead_and_the_services_live_on(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    pace_file = tmp_path / "pace"
    pace_file.write_text(str(PACE_SECONDS))
    write_prompts(tmp_path / "train.jsonl", NUM_PROMPTS, pace_file)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(part_config(PART, tmp_path)), encoding="utf-8")
    rng = random.Random(SEED)
    queue = OwnQueue(tmp_path / "queue")
    launch = Launch(config, tmp_path / "runs" / "chaos", queue.environment)
    try:
        with redis.Redis(port=queue.server.port, password=queue.server.password) as client:
            launch.start()
            prefix = "penstock:{chaos}:"
            right_parts = example_parts(client, prefix)
            examples = example_messages(client, prefix)
            num_sent = 0
            for stream in STREAMS:
                others = [message for name, message in examples.items() if {name, stream} != {"eval", "tickets"}]
                wrong = [{b"t": b"999999", b"a": b"0", b"p": each} for each in others if each != examples[stream]]
                for fields in (*wrong, *fuzzed_fields(rng, examples[stream])):
                    client.xadd(prefix + stream, fields)
                    num_sent += 1
            for stream in ("rollouts", "scored"):
                for name, parts in fuzzed_parts(rng, right_parts):
                    if stream == "scored" and parts.get("completions") == right_parts["completions"]:
                        continue  # no one reads its texts, since it is a duplicate: no harm
                    for part, data in parts.items():
                        client.set(f"{prefix}part:{name.decode()}:{part}", data)
                    fields = {b"t": b"999999", b"a": b"0", b"p": as_of(examples[stream], 999999), b"n": name}
                    client.xadd(prefix + stream, fields)
                    num_sent += 1
            deadline = time.monotonic() + RUN_SECONDS
            while client.xlen(prefix + "dead") < num_sent and launch.exit_code() is None:
                assert time.monotonic() < deadline, f"{client.xlen(prefix + 'dead')} of {num_sent} are dead letters"
                time.sleep(0.1)
            pace_file.write_text("0")
            exit_code = wait_for_end(launch)
            assert exit_code == 0, launch.tail()
            letters = client.xlen(prefix + "dead")
            left = {stream: client.xlen(prefix + stream) for stream in STREAMS}
        findings = read_part(PART, launch, queue)
    finally:
        launch.end()
        queue.stop()
    assert num_sent > 100
    assert letters == num_sent
    assert left == dict.fromkeys(STREAMS, 0)
    assert findings.problems == []
    assert findings.trained == findings.issued == PART.num_tickets
    summary = json.loads((launch.run_folder / "summary.json").read_bytes())
    assert not any(summary["restarts"].values()), summary["restarts"]


def wait_for_end(launch: Launch) -> int | None:
    deadline = time.monotonic() + RUN_SECONDS
    while (code := launch.exit_code()) is None and time.monotonic() < deadline:
        launch.below()
        time.sleep(0.1)
    return code
