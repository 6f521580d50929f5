"""The tables of docs/gpu.md: which model fits where, by the launcher's own estimate.

Owns the text between the two markers of that page; the rest of it is written by hand.
"""

from collections.abc import Iterator

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_launch.gpus.fit import fit_shape
from penstock_launch.gpus.memory import GIB, MIB
from penstock_launch.gpus.model_shape import ModelShape, shape_of_config
from penstock_launch.gpus.nvidia import Gpu
from penstock_launch.gpus.plan import Placement
from penstock_launch.gpus.shares import with_gpus
from penstock_launch.gpus.trainer_memory import LOADING, host_need

BEGIN, END = "<!-- fits: written by docs/generate_fits.py -->", "<!-- end of fits -->"
# Hidden and inner size, layers, heads, key heads, vocabulary, whether it is tied: those of Qwen2.5.
MODELS = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
}
MEMORY_MIB = {"24 GB": 24564, "48 GB": 46068, "80 GB": 81559, "141 GB": 143771}  # RTX 4090, L40S, H100, H200
LORA_RANK = 16
PACKS = (16384, 8192, 4096, 2048)
# Number of GPUs -> GPUs of a server, servers, ranks: the first that fits counts. With one GPU it is shared.
SPLITS = {
    1: ((1, 1, 1),),
    2: ((1, 1, 1),),
    8: ((1, 4, 4), (2, 2, 4), (4, 1, 4), (2, 1, 6), (1, 1, 7)),
}


def filled(page: str) -> str:
    """The page with the tables as they should be between the markers; ValueError without them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/gpu.md lacks {BEGIN} or {END}: expected both, for the tables between them")
    return f"{before}{BEGIN}\n\n{chr(10).join(tables())}\n{END}{after}"


def tables() -> Iterator[str]:
    """One table for each number of GPUs."""
    titles = {
        1: "One GPU for trainer and engine side by side",
        2: "Two GPUs: one engine, one rank",
        8: "Eight GPUs",
    }
    for num_gpus, title in titles.items():
        yield f"**{title}**"
        yield ""
        columns = [f"{kind}, {memory}" for kind in ("all weights", f"LoRA {LORA_RANK}") for memory in MEMORY_MIB]
        host = ["host GiB at start"] if num_gpus > 2 else []
        yield "| Model | " + " | ".join([*columns, *host]) + " |"
        yield "| --- |" + " --- |" * len(columns) + " ---: |" * len(host)
        for name in MODELS:
            yield f"| {name} | " + " | ".join([*_cells(name, num_gpus), *([_loading(name)] if host else [])]) + " |"
        yield ""


def _cells(name: str, num_gpus: int) -> Iterator[str]:
    for lora_rank in (0, LORA_RANK):
        for memory_mib in MEMORY_MIB.values():
            yield _cell(_shape(name), num_gpus, memory_mib * MIB, lora_rank)


def _cell(shape: ModelShape, num_gpus: int, memory_bytes: int, lora_rank: int) -> str:
    """The largest pack that fits; if none of at least 4096 does, with checkpointing (c)."""
    for checkpointing, packs in ((False, PACKS[:3]), (True, PACKS)):
        for split in SPLITS[num_gpus]:
            for rows in packs:
                if _fits(_config(split, rows, lora_rank, checkpointing), shape, num_gpus, memory_bytes):
                    gpus, servers, ranks = split
                    how = f"{servers} x {gpus} + {ranks}: " if num_gpus > 2 else ""
                    return f"{how}{rows}{' c' * checkpointing}"
    return "-"


def _fits(config: Config, shape: ModelShape, num_gpus: int, memory_bytes: int) -> bool:
    gpus = tuple(Gpu(index, f"GPU-{index}", "GPU", memory_bytes, 0) for index in range(num_gpus))
    per_server, num_servers = config.rollout.engine.num_gpus, config.rollout.num_servers
    servers = tuple(gpus[index * per_server : (index + 1) * per_server] for index in range(num_servers))
    first = num_servers * per_server if num_gpus > 1 else 0
    placement = Placement(gpus, gpus[first : first + config.trainer.num_ranks], servers)
    try:
        return not fit_shape(with_gpus(config, placement), placement, shape).warnings
    except ConfigError:
        return False


def _config(split: tuple[int, int, int], rows: int, lora_rank: int, checkpointing: bool) -> Config:
    per_server, num_servers, num_ranks = split
    return Config.model_validate(
        {
            "actor": {
                "path": "model",
                "lora": {"rank": lora_rank},
                "max_tokens_per_micro_batch": rows,
                "gradient_checkpointing": checkpointing,
            },
            "data": {"train": {"path": "data.jsonl"}},
            "trainer": {"num_ranks": num_ranks},
            "rollout": {"num_servers": num_servers, "engine": {"tensor_parallel_size": per_server}},
        }
    )


def _loading(name: str) -> str:
    config = _config((1, 4, 4), PACKS[0], 0, False)
    return f"{host_need(config, _shape(name)).of(LOADING) / GIB:.0f}"


def _shape(name: str) -> ModelShape:
    hidden, inner, layers, heads, keys, vocabulary, tied = MODELS[name]
    return shape_of_config(
        {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 32768,
        }
    )
