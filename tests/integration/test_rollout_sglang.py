"""The rollout service with a real SGLang on a tiny random Llama: skipped where SGLang's environment is missing."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from penstock.broker import Announcement
from penstock.config import EngineSection, WeightsSection
from penstock.contracts import PolicyIdentity, Sampling, pack_int32, unpack_float32, unpack_int32
from penstock.errors import EngineRejectedError
from penstock.local_folder import LocalFolder
from penstock.manifest import MANIFEST_NAME, Manifest, TensorEntry, identity_digest
from penstock_rollout.engine.answers import completions
from penstock_rollout.engine.client import EngineClient
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.process import StartedServer
from penstock_rollout.local_copy import LocalCopy
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights import Weights

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
VOCABULARY = 300
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with SGLang: `make envs` makes one"),
]

# Run in a process of its own, so that torch's import does not bring its warnings into this one.
MAKE_MODEL = """
import json, sys, torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
folder, seed, vocabulary = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(seed)
config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=0,
                     eos_token_id=1, initializer_range=0.2)
model = LlamaForCausalLM(config).float()
model.lm_head.weight.data[config.eos_token_id] = 0  # never the likeliest token: greedy completions do not end
model.save_pretrained(folder)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
"""
SCORE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
out = []
for prompt, tokens in json.load(sys.stdin):
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([prompt + tokens])).logits[0].float(), -1)
    out.append([logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(tokens)])
print(json.dumps(out))
"""
# The first version whole, then four deltas of what Adam does at first; the last model also as transformers saves it.
PUBLISH = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from penstock.local_folder import LocalFolder
from penstock_trainer.delta_writer import DeltaWriter
from penstock_trainer.export import config_json
from penstock_trainer.staging import Staging
from penstock_trainer.weight_files import Format, published_weights

class Source:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    def weights(self): return published_weights(self.model)
    def config_json(self, dtype): return config_json(self.model, dtype)

root, form = Path(sys.argv[2]), Format("float32", "dithered")
deltas = DeltaWriter(lambda num_bytes: LocalFolder("trainer", num_bytes, str(root / "local")), form, 100)
staging = Staging(Source(), root / "weights", form, deltas=deltas)
torch.manual_seed(0)
for version in range(2, 7):
    identity = staging.write(version, 1)
    print(staging.folder_of(version, 1), identity.digest)
    if version < 6:
        with torch.no_grad():
            for weight in Source.model.parameters():
                weight += 0.01 * torch.sign(torch.randn_like(weight)) * (torch.rand_like(weight) < 0.1)
Source.model.save_pretrained(root / "expected")
"""
HOLD = """
import asyncio, sys
from pathlib import Path
from penstock.config import EngineSection
from penstock_rollout.engine.process import StartedServer

async def main():
    limits = {"max_running_requests": 8, "max_total_tokens": 1024}
    section = EngineSection(python=sys.argv[1], device="cpu", dtype="float32", **limits)
    await StartedServer(section, sys.argv[2], Path(sys.argv[3])).start()
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def run_python(code: str, *arguments: str, given: str = "") -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=given,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random models of one shape."""
    root = tmp_path_factory.mktemp("models")
    folders = root / "a", root / "b"
    for seed, folder in enumerate(folders):
        run_python(MAKE_MODEL, str(folder), str(seed), str(VOCABULARY))
    return folders


@pytest.fixture
async def engine(models: tuple[Path, Path], tmp_path: Path) -> AsyncIterator[Engine]:
    section = EngineSection(
        python=str(PYTHON), device="cpu", dtype="float32", max_running_requests=16, max_total_tokens=16384
    )
    engine = Engine(StartedServer(section, str(models[0]), tmp_path / "engine.log"), EngineClient(section))
    stop = asyncio.Event()
    keeping = asyncio.create_task(engine.keep_engine(stop, lambda: None))
    up = asyncio.create_task(engine.up.wait())
    await asyncio.wait({keeping, up}, return_when=asyncio.FIRST_COMPLETED)
    if keeping.done():
        await keeping
    yield engine
    stop.set()
    await keeping
    await engine.close()


async def test_generation_weights_and_death(engine: Engine, models: tuple[Path, Path], tmp_path: Path) -> None:
    """One start of the engine serves all, since a start takes half a minute."""
    weights = Weights(engine, WeightsSection(), RolloutMetrics())
    first, second = (stage(folder, version) for version, folder in enumerate(models))
    await weights.update(first)
    assert engine.client.info.vocabulary_size == VOCABULARY
    prompts, seeds, sampling = ([5, 6, 7], list(range(40, 75))), (1, 2, 3, 4), Sampling(1.0, 12, (1,))

    async def groups(limits: Sampling) -> list[tuple[list[int], list[int], list[float]]]:
        answers = await asyncio.gather(
            *(engine.client.generate(pack_int32(prompt), seeds, limits) for prompt in prompts)
        )
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
    scored = json.loads(run_python(SCORE, str(models[0]), given=json.dumps([each[:2] for each in results])))
    for (_, _, logprobs), expected in zip(results, scored, strict=True):
        assert logprobs == pytest.approx(expected, abs=1e-4)

    greedy = Sampling(0.0, 6, (1,))
    mixed = await asyncio.gather(groups(greedy), groups(sampling))
    assert [tokens for _, tokens, _ in mixed[1]] == [tokens for _, tokens, _ in results]
    assert len({tuple(tokens) for _, tokens, _ in mixed[0]}) == 2

    running = asyncio.create_task(engine.client.generate(pack_int32([9, 9]), seeds, Sampling(0.0, 3000, ())))
    await asyncio.sleep(0.5)  # 3000 tokens take several times as long
    await weights.update(second)
    survivors = completions(await running, weights.known)
    assert {len(each.loss_mask) for each in survivors} == {3000}
    spans = [each.spans for each in survivors]
    assert {span.policy for each in spans for span in each} == {first.identity, second.identity}
    results = await groups(sampling)
    scored = json.loads(run_python(SCORE, str(models[1]), given=json.dumps([each[:2] for each in results])))
    for (_, _, logprobs), expected in zip(results, scored, strict=True):
        assert logprobs == pytest.approx(expected, abs=1e-4)

    published = [line.split() for line in run_python(PUBLISH, str(models[1]), str(tmp_path)).splitlines()]
    whole, newest = (
        Announcement(PolicyIdentity(version, digest), path, 1)
        for version, (path, digest) in ((2, published[0]), (6, published[-1]))
    )
    weights.copy = LocalCopy(lambda num_bytes: LocalFolder("rollout", num_bytes, str(tmp_path / "local")))
    await weights.update(whole)
    await weights.update(newest)  # over three versions that were missed
    results = await groups(sampling)
    scored = json.loads(run_python(SCORE, str(tmp_path / "expected"), given=json.dumps([each[:2] for each in results])))
    for (_, _, logprobs), expected in zip(results, scored, strict=True):
        assert logprobs == pytest.approx(expected, abs=1e-4)

    with pytest.raises(EngineRejectedError, match="vocabulary"):
        await engine.client.generate(pack_int32([VOCABULARY]), (1,), sampling)
    with pytest.raises(EngineRejectedError, match="context_length"):
        await engine.client.generate(pack_int32([5]), (1,), Sampling(1.0, 4096, ()))

    scheduler = next(
        each for each in psutil.Process().children(recursive=True) if "scheduler" in "".join(each.cmdline())
    )
    scheduler.kill()
    async with asyncio.timeout(60):
        while engine.up.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    async with asyncio.timeout(300):
        await engine.up.wait()
    assert engine.epoch == 2


def test_a_killed_service_leaves_nothing_of_its_engine(models: tuple[Path, Path], tmp_path: Path) -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in ("common", "services/rollout"))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(PYTHON), str(models[0]), str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"ready\n"
        tree = psutil.Process(holder.pid).children(recursive=True)
        assert len(tree) >= 3  # HTTP server, scheduler, detokenizer
        holder.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(tree, timeout=20)
    assert alive == []
