"""Whether the check warns of bfloat16 on a CPU without instructions for it."""

from pathlib import Path

import pytest

from penstock.config import Config
from penstock_launch.check.precision import keys_on_a_cpu, precision_lines, read_flags

BOTH = ["actor.dtype", "rollout.engine.dtype"]


def config(actor: str = "bfloat16", engine: str = "bfloat16", device: str = "auto", url: str = "") -> Config:
    return Config.model_validate(
        {
            "actor": {"path": "m", "dtype": actor},
            "rollout": {"engine": {"dtype": engine, "device": device, "url": url}},
            "trainer": {"device": device},
            "data": {"train": {"path": "d.jsonl"}},
        }
    )


@pytest.mark.parametrize(
    ("seen", "has_driver", "keys"),
    [
        (config(), False, BOTH),
        (config(), True, []),
        (config(device="cpu"), True, BOTH),
        (config(actor="float32"), False, ["rollout.engine.dtype"]),
        (config(actor="float32", engine="float32"), False, []),
        (config(url="http://127.0.0.1:1"), False, ["actor.dtype"]),
    ],
)
def test_only_what_computes_on_a_cpu_of_this_host_counts(seen: Config, has_driver: bool, keys: list[str]) -> None:
    assert keys_on_a_cpu(seen, has_driver=has_driver) == keys


def test_a_cpu_without_the_instructions_is_named_with_the_keys() -> None:
    [line] = precision_lines(BOTH, {"avx2", "avx512f"})
    assert line.verdict == "warning"
    assert line.seen.startswith("actor.dtype and rollout.engine.dtype are bfloat16, and this CPU has no instructions")
    assert line.advice == "Set actor.dtype and rollout.engine.dtype to float32."


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "bf16"])
def test_a_cpu_with_the_instructions_is_fine(flag: str) -> None:
    [line] = precision_lines(BOTH, {"avx2", flag})
    assert (line.verdict, flag in line.seen) == ("ok", True)


def test_nothing_is_said_of_float32_or_of_an_unknown_cpu() -> None:
    assert precision_lines([], {"avx2"}) == precision_lines(BOTH, frozenset()) == []


def test_the_flags_are_those_of_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert read_flags(tmp_path / "x86") == {"fpu", "avx2", "amx_bf16"}
    assert read_flags(tmp_path / "arm") == {"fp", "asimd", "bf16"}
    assert read_flags(tmp_path / "none") == frozenset()
