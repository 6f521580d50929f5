"""Two rollout services with real SGLang engines and random models for them.

A start takes half a minute, so all modules named `test_*_sglang` use the same two, one after the other. Tests leave
both running, with any weights.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.push_setup import RolloutServer, rollout_server
from penstock.config import Config
from tests.patience import START_SECONDS

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
VOCABULARY = 300
NUM_MODELS = 4
NUM_REQUESTS = 16  # at the same time
DEADLINE_SECONDS = 20.0  # for a push: on an idle machine it takes less than one; a test waits for it


def make_models(root: Path) -> tuple[Path, ...]:
    """Random models of one shape whose greedy completions never end."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
    folders = tuple(root / str(seed) for seed in range(NUM_MODELS))
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
        model.lm_head.weight.data[config.eos_token_id] = 0  # never the most likely token
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def pair_config(model: Path, folder: Path, transport: str) -> Config:
    engine = {"python": str(PYTHON), "device": "cpu", "dtype": "float32", "max_running_requests": NUM_REQUESTS}
    return Config.model_validate(
        {
            "actor": {"path": str(model), "dtype": "float32"},
            "data": {"train": {"path": "unused"}},
            "run": {"root": str(folder), "name": "sglang"},
            "rollout": {"engine": {**engine, "max_total_tokens": 16384}},
            "weights": {
                "transport": transport,
                "folder": str(folder / "weights"),
                "bucket_bytes": 65536,  # several buckets, and weights that need one of their own
                "push_timeout_seconds": DEADLINE_SECONDS,
            },
        }
    )


@asynccontextmanager
async def running_pair(model: Path, folder: Path) -> AsyncIterator[list[RolloutServer]]:
    """The two services, started at the same time with the same model."""
    config = pair_config(model, folder, "disk")
    async with AsyncExitStack() as stack:
        names = ("first", "second")
        servers = [await stack.enter_async_context(rollout_server(name, config, folder)) for name in names]
        await all_up(servers)
        yield servers


async def all_up(servers: list[RolloutServer]) -> None:
    async with asyncio.timeout(2 * START_SECONDS):
        await asyncio.gather(*(server.engine.up.wait() for server in servers))


def scheduler_of(server: RolloutServer) -> psutil.Process:
    """The process that holds the weights."""
    tree = psutil.Process(server.server.pid).children(recursive=True)
    return next(each for each in tree if "scheduler" in "".join(each.cmdline()))
