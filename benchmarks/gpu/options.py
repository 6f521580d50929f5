"""What a user gives the kit: where results go, what was carried to the machine, and the form for a CPU."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.contracts import Dtype

ENGINE_PYTHON = Path(".venv-sglang/bin/python")


@dataclass(frozen=True)
class Options:
    """Paths are None if there is nothing at them. engine_args: further arguments of SGLang."""

    out: Path
    minutes: float
    cpu: bool
    model: Path | None
    engine_python: Path | None
    engine_args: tuple[str, ...]
    gsm8k: Path | None
    peak_tflops: float | None

    @property
    def device(self) -> str:
        return "cpu" if self.cpu else "cuda"

    @property
    def dtype(self) -> Dtype:
        """Of the computation: a CPU without AMX computes bfloat16 more slowly."""
        return "float32" if self.cpu else "bfloat16"


def add_options(parser: argparse.ArgumentParser, environ: Mapping[str, str] = os.environ) -> None:
    """Each path may also be in the environment, for a machine on which several commands are run."""
    out = environ.get("GPU_KIT_OUT", "runs/gpu-kit")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the results (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="time of each part (default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU: shows that the kit itself works")
    parser.add_argument(
        "--model", default=environ.get("GPU_KIT_MODEL", ""), help="folder of a small model, such as SmolLM2-135M"
    )
    parser.add_argument(
        "--engine-python",
        default=environ.get("GPU_KIT_ENGINE_PYTHON", str(ENGINE_PYTHON)),
        help="Python interpreter that has SGLang (default: %(default)s)",
    )
    parser.add_argument(
        "--engine-args",
        default=environ.get("GPU_KIT_ENGINE_ARGS", ""),
        help='further arguments of SGLang in one string: --engine-args="--attention-backend triton"',
    )
    parser.add_argument(
        "--gsm8k", default=environ.get("GPU_KIT_GSM8K", ""), help="folder with GSM8K, as `save_to_disk` wrote it"
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="dense bfloat16 peak of this GPU, for utilisation (default: by its name)"
    )


def options_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Options:
    """Ends the process, with code 2, if something that was given is not there."""

    def existing(option: str, default: str = "") -> Path | None:
        given: str = getattr(arguments, option)
        if given and Path(given).exists():
            return Path(given).absolute()
        if given != default:
            parser.error(f"--{option.replace('_', '-')} is {given}: nothing is there; expected a path of this machine")
        return None

    return Options(
        out=arguments.out,
        minutes=arguments.minutes,
        cpu=arguments.cpu,
        model=existing("model"),
        engine_python=existing("engine_python", str(ENGINE_PYTHON)),
        engine_args=tuple(arguments.engine_args.split()),
        gsm8k=existing("gsm8k"),
        peak_tflops=arguments.peak_tflops,
    )
