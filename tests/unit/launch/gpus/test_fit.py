"""What fits on which GPU: what is refused before a start, what is warned of, and how a GPU is shared."""

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock.contracts import ServiceKind
from penstock.errors import ConfigError
from penstock_launch.gpus.engine_memory import EngineMemory, default_fraction
from penstock_launch.gpus.fit import fit
from penstock_launch.gpus.memory import GIB, MIB
from penstock_launch.gpus.model_shape import NoShapeError, read_shape, shape_of_config
from penstock_launch.gpus.plan import plan
from penstock_launch.gpus.shares import place, shown_placement, with_gpus
from tests.gpus import FakeGpu, host_with_gpus, mig_uuid
from tests.unit.launch.gpus.test_plan import host


# Built like Llama; sizes of public models.
def built(hidden: int, inner: int, layers: int, heads: int, keys: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    }


SMALL = built(896, 4864, 24, 14, 2)
MEDIUM = built(2048, 11008, 36, 16, 2)
LARGE = built(3584, 18944, 28, 28, 4)
COMMON: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768}


def model(folder: Path, *, tied: bool = True, **shape: Any) -> str:
    """A folder with a config.json and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {**COMMON, "tie_word_embeddings": tied, **shape}
    (folder / "config.json").write_text(json.dumps(document))
    return str(folder)


def config(path: str, **sections: Any) -> Config:
    actor = {"path": path, **sections.pop("actor", {})}
    return Config.model_validate({"actor": actor, "data": {"train": {"path": "d.jsonl"}}, **sections})


def environ_of(folder: Path, *memory_mib: int) -> dict[str, str]:
    return host_with_gpus(folder / "bin", [FakeGpu(memory_mib=mib) for mib in memory_mib])


def test_what_surely_does_not_fit_is_refused_with_the_keys_to_change(tmp_path: Path) -> None:
    run = config(model(tmp_path / "large", tied=False, **LARGE))
    with pytest.raises(ConfigError) as refused:
        place(run, environ_of(tmp_path, 81559, 81559))
    text = str(refused.value)
    for words in ("GPU 1", "79.6 GiB", "master weights", "28.4", "moments", "56.7", "trainer.num_ranks", "actor.lora"):
        assert words in text
    assert "key-value" not in text  # of another GPU
    place(config(run.actor.path, actor={"lora": {"rank": 16}}), environ_of(tmp_path, 81559, 81559))


def test_an_estimate_above_the_gpu_is_a_warning_and_nothing_more(tmp_path: Path) -> None:
    path = model(tmp_path / "medium", **MEDIUM)
    sizes = {"max_tokens_per_micro_batch": 32768}
    lines = place(config(path, actor=sizes), environ_of(tmp_path, 81559, 81559)).lines()
    (warning,) = (line for line in lines if "may run out" in line)
    assert "GPU 1" in warning
    checkpointing = {**sizes, "gradient_checkpointing": True}
    assert not any(
        "may run out" in line
        for line in place(config(path, actor=checkpointing), environ_of(tmp_path, 81559, 81559)).lines()
    )


@pytest.mark.parametrize("order", ["trainer first", "engine first", "in between", "half in between"])
@pytest.mark.parametrize("memory_gib", [24, 48, 80, 141])
def test_on_a_shared_gpu_the_engine_gets_its_cache_in_any_order_of_starts(
    tmp_path: Path, memory_gib: int, order: str
) -> None:
    """By SGLang's rule: what is free after it has loaded, less (1 - f) of what was free before."""
    path = model(tmp_path / "small", **SMALL)
    run = place(config(path), environ_of(tmp_path, memory_gib * 1024))
    share = run.share(ServiceKind.ROLLOUT, 0)
    assert share.overrides[-2:] == run.share(ServiceKind.TRAINER).overrides[-2:]
    assert run.share(ServiceKind.REWARD).overrides == ()
    fraction_key, fraction, tokens_key, tokens = share.overrides
    assert (fraction_key, tokens_key) == ("--rollout.engine.memory_fraction", "--rollout.engine.max_total_tokens")
    ((gpu, (trainer, engine)),) = run.memory.by_gpu
    section = config(path).rollout.engine
    sizes = EngineMemory(section, read_shape(path), gpu.memory_bytes)
    assert int(tokens) >= sizes.fewest_tokens
    assert trainer.num_bytes + engine.num_bytes <= gpu.memory_bytes

    before, during = {
        "trainer first": (trainer.num_bytes, 0),
        "engine first": (0, 0),
        "in between": (0, trainer.num_bytes),
        "half in between": (trainer.num_bytes // 2, trainer.num_bytes // 2),
    }[order]
    free_at_start = gpu.memory_bytes - before - GIB // 2
    free_when_loaded = free_at_start - during - sizes.weights_bytes
    room = free_when_loaded - free_at_start * (1 - float(fraction))
    assert room >= int(tokens) * sizes.token_bytes


def test_a_shared_gpu_with_too_little_left_is_refused(tmp_path: Path) -> None:
    path = model(tmp_path / "medium", **MEDIUM)
    with pytest.raises(ConfigError, match="share GPU 0") as refused:
        place(config(path), environ_of(tmp_path, 64 * 1024))
    for words in ("master weights", "key-value cache", "reserve", "rollout.engine.memory_fraction", "trainer.gpus"):
        assert words in str(refused.value)
    run = place(config(path, rollout={"engine": {"memory_fraction": 0.5}}), environ_of(tmp_path, 64 * 1024))
    assert run.share(ServiceKind.ROLLOUT, 0).overrides == ()
    assert any("may run out" in line for line in run.lines())


def test_the_gpu_that_is_shared_counts_and_is_named(tmp_path: Path) -> None:
    path = model(tmp_path / "small", **SMALL)
    engine = {"tensor_parallel_size": 2}
    run = config(path, rollout={"gpus": [1, 0], "engine": engine}, trainer={"gpus": [0]})
    place(run, host_with_gpus(tmp_path / "bin", [FakeGpu(), FakeGpu(used_mib=60000)]))
    with pytest.raises(ConfigError, match=r"share GPU 0 (.|\n)*in use now 58\.6"):
        place(run, host_with_gpus(tmp_path / "bin", [FakeGpu(used_mib=60000), FakeGpu()]))


def test_who_takes_turns_need_not_fit_side_by_side(tmp_path: Path) -> None:
    path = model(tmp_path / "medium", **MEDIUM)
    turns = config(path, trainer={"take_turns": True}, actor={"gradient_checkpointing": True})
    run = place(turns, environ_of(tmp_path, 81559))
    assert run.memory.sharing == ()
    ((gpu, (trainer, engine)),) = run.memory.by_gpu
    assert trainer.num_bytes + engine.num_bytes > gpu.memory_bytes
    assert any(" in turns with rollout " in line for line in run.lines() if line.startswith("memory of GPU 0: trainer"))
    assert not any("may run out" in line for line in run.lines())
    with pytest.raises(ConfigError, match=r"has 45\.0 GiB, and weights, moments"):
        place(config(path, trainer={"take_turns": True}), environ_of(tmp_path, 45 * 1024))


def test_given_sizes_stay_as_they_are_on_a_shared_gpu(tmp_path: Path) -> None:
    path = model(tmp_path / "small", **SMALL)
    for words in (["--mem-fraction-static", "0.3"], ["--mem-fraction=0.3"]):
        by_flag = config(path, rollout={"engine": {"extra_args": words}})
        assert place(by_flag, environ_of(tmp_path, 81559)).memory.sharing == ()
    by_tokens = config(path, rollout={"engine": {"max_total_tokens": 5000}})
    assert place(by_tokens, environ_of(tmp_path, 81559)).memory.trainer_overrides[-1] == "5000"


def test_only_the_engine_that_shares_its_gpu_is_bounded(tmp_path: Path) -> None:
    lists: dict[str, Any] = {"rollout": {"num_servers": 2, "gpus": ["0", "1"]}, "trainer": {"gpus": ["1"]}}
    run = place(config(model(tmp_path / "small", **SMALL), **lists), environ_of(tmp_path, 81559, 81559))
    assert run.share(ServiceKind.ROLLOUT, 0).overrides == ()
    assert run.share(ServiceKind.ROLLOUT, 1).overrides[0] == "--rollout.engine.memory_fraction"
    assert "--rollout.engine.max_total_tokens" in run.share(ServiceKind.TRAINER).overrides


def test_engines_of_their_own_keep_the_default_of_sglang(tmp_path: Path) -> None:
    run = place(config(model(tmp_path / "small", **SMALL)), environ_of(tmp_path, 81559, 81559))
    assert run.memory.sharing == ()
    gpu, (engine,) = run.memory.by_gpu[0]
    assert engine.num_bytes == gpu.memory_bytes
    static = default_fraction(gpu.memory_bytes, 1, 64) * gpu.memory_bytes
    assert engine.of("weights") + engine.of("key-value cache") == pytest.approx(static, abs=MIB)


def test_tensor_parallelism_divides_weights_and_heads_but_no_head() -> None:
    shape = shape_of_config({**COMMON, **LARGE})

    def engine(num_gpus: int) -> EngineMemory:
        section = config("m", rollout={"engine": {"tensor_parallel_size": num_gpus}}).rollout.engine
        return EngineMemory(section, shape, 80 * GIB)

    one, four, eight = engine(1), engine(4), engine(8)
    assert one.token_bytes == 2 * 28 * 4 * 128 * 2
    assert (four.token_bytes, eight.token_bytes) == (one.token_bytes // 4, one.token_bytes // 4)
    assert eight.weights_bytes == one.weights_bytes // 8


@pytest.mark.parametrize(
    ("total_mib", "num_gpus", "fraction"),
    # 1 - (512 + 1.5 x prefill + 128 x GPUs + 2 x requests + 8 x sizes) / MiB, by hand from SGLang's source:
    [
        (24564, 1, 0.704),  # 512 + 6144 + 128 + 2 x 48 + 8 x 50
        (81559, 1, 0.834),  # 512 + 12288 + 128 + 2 x 64 + 8 x 58
        (81559, 8, 0.823),  # 512 + 12288 + 1024 + 2 x 64 + 8 x 58
        (143771, 1, 0.906),
    ],
)
def test_default_fraction_is_that_of_sglang(total_mib: int, num_gpus: int, fraction: float) -> None:
    assert default_fraction(total_mib * MIB, num_gpus, 64) == fraction


def test_a_model_that_is_not_known_is_only_noted(tmp_path: Path) -> None:
    run = place(config(str(tmp_path / "nothing")), environ_of(tmp_path, 81559))
    (line,) = (line for line in run.lines() if "no estimate" in line)
    assert "set rollout.engine.memory_fraction" in line


def test_a_gpu_that_shows_no_memory_is_only_noted(tmp_path: Path) -> None:
    run = place(config(model(tmp_path / "large", tied=False, **LARGE)), environ_of(tmp_path, 0))
    (line,) = (line for line in run.lines() if "no estimate" in line)
    assert "the driver does not show that of GPU 0, and trainer and engine share" in line
    assert run.memory.sharing == ()


def test_the_plan_shows_the_table(tmp_path: Path) -> None:
    lines = shown_placement(config(model(tmp_path / "small", **SMALL)), environ_of(tmp_path, 81559))
    assert any(line.startswith("memory of GPU 0: trainer ") for line in lines)
    assert any("master weights" in line and "actor.path" in line for line in lines)


def test_equal_gpus_are_one_line(tmp_path: Path) -> None:
    run = config(model(tmp_path / "small", **SMALL), trainer={"num_ranks": 4}, rollout={"num_servers": 4})
    placement = plan(run, host(8), {})
    lines = fit(with_gpus(run, placement), placement, 64 * GIB).lines()
    assert [line.partition(":")[0] for line in lines if "4, 5, 6, 7" in line] == ["memory of GPU 4, 5, 6, 7"]
    assert [line.partition(": ")[2][:8] for line in lines if "0, 1, 2, 3" in line] == ["rollout "]
    assert sum("together" in line for line in fit(with_gpus(run, placement), placement, 64 * GIB).table()) == 2
    assert not any("host" in line for line in lines)
    (warning,) = fit(with_gpus(run, placement), placement, 4 * GIB).warnings
    assert "trainer.num_ranks 4, and the host has 4.0" in warning


def test_instances_of_one_gpu_are_told_apart(tmp_path: Path) -> None:
    environ = host_with_gpus(tmp_path / "bin", [FakeGpu(mig_mib=(20096, 40192))])
    lines = place(config(model(tmp_path / "small", **SMALL)), environ).lines()
    assert [line.partition(":")[0] for line in lines if line.startswith("memory")] == [
        f"memory of GPU {mig_uuid(0, instance)}" for instance in (0, 1)
    ]


def test_shapes_are_read_from_headers_or_refused(tmp_path: Path, tiny_model: Path) -> None:
    found = read_shape(str(tiny_model))
    config_only = shape_of_config(json.loads((tiny_model / "config.json").read_text()))
    assert found.num_weights == config_only.num_weights
    assert found.weights == config_only.weights
    for path, reason in (("no/model", "hub name"), (str(tmp_path), "no folder|hub name")):
        with pytest.raises(NoShapeError, match=reason):
            read_shape(path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    half = Path(model(tmp_path / "half", **SMALL))
    (half / "model-1.safetensors").write_bytes(b"")
    (half / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (
        read_shape(str(half)).num_weights
        == shape_of_config({**COMMON, "tie_word_embeddings": True, **SMALL}).num_weights
    )
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(NoShapeError, match="hidden_size"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    for data in (b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x0a" + bytes(7) + b'{"a": [1]}'):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(NoShapeError, match=r"cannot be read .*expected a safetensors file"):
            read_shape(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "7", '{"text_config": 3}', json.dumps({**COMMON, **SMALL, "num_attention_heads": 0})]
    + [json.dumps({**COMMON, **SMALL, key: value}) for key, value in (("head_dim", [1]), ("hidden_size", "wide"))],
)
def test_a_config_of_nonsense_has_no_shape(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(NoShapeError, match=r"config\.json|cannot be read"):
        read_shape(str(tmp_path))
