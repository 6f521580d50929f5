"""The command line and environment that SGLang is started with, from the configuration.

Pure functions; each choice that is not SGLang's own default carries its reason.
"""

from collections.abc import Mapping
from pathlib import Path

from penstock.config import EngineSection
from penstock_rollout.engine.sglang.prefetch import prefetch_address

LAUNCHER = Path(__file__).with_name("inside") / "launcher.py"
CPU_MAX_TOTAL_TOKENS = 65536  # SGLang would size the cache by free memory, which trainer and engine share here
# SGLang ends at its start if its weights, and all that others take while it loads them, exceed this share of the memory
# that was free before: a trainer that starts beside it, say. The number of tokens bounds the cache itself.
CPU_MEMORY_FRACTION = 0.9
CPU_DEFAULT_MEMORY_FRACTION = 0.4  # of a cache of CPU_MAX_TOTAL_TOKENS, which may be larger than the host
# By default glibc maps and unmaps each large tensor anew and faults in its pages: a third of a CPU engine's time.
KEEP_FREED_BYTES = {
    "MALLOC_TRIM_THRESHOLD_": str(2**29),
    "MALLOC_MMAP_THRESHOLD_": str(2**29),
    "MALLOC_TOP_PAD_": str(2**26),
}


def command(
    section: EngineSection,
    python: str,
    device: str,
    model_path: str,
    port: int,
    *,
    overlap: bool = True,
    gives_up_memory: bool = False,
    returns_experts: bool = False,
) -> list[str]:
    """The launcher's command line. `extra_args` come last, so they override the others.

    `overlap`: whether a token may be sampled before the previous one has been recorded. `gives_up_memory`: whether it
    can give its GPU memory up. `returns_experts`: whether it can return the experts of tokens.
    """
    arguments = {
        "--model-path": model_path,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--device": device,
        "--dtype": section.dtype,
        "--max-running-requests": str(section.max_running_requests),
        "--grammar-backend": "none",
        "--log-level": "warning",
    }
    # Without this, an idle scheduler polls, and takes a full core from trainer and rewards.
    flags = ["--sleep-on-idle", "--skip-server-warmup"]
    total_tokens, fraction = section.max_total_tokens, section.memory_fraction
    if device == "cpu":
        arguments |= {
            "--attention-backend": "torch_native",  # the default on x86 needs AMX
            "--sampling-backend": "pytorch",
        }
        fraction = fraction or (CPU_MEMORY_FRACTION if total_tokens else CPU_DEFAULT_MEMORY_FRACTION)
        overlap = False  # it would overlap with a GPU, and there is none
        total_tokens = total_tokens or CPU_MAX_TOTAL_TOKENS
    elif gives_up_memory:
        flags.append("--enable-memory-saver")  # without it SGLang answers, and keeps the memory
    if returns_experts:
        flags.append("--enable-return-routed-experts")
    if not overlap:
        flags.append("--disable-overlap-schedule")
    if section.tensor_parallel_size > 1:
        arguments["--tp-size"] = str(section.tensor_parallel_size)
    if fraction:
        arguments["--mem-fraction-static"] = f"{fraction:g}"
    if total_tokens:
        arguments["--max-total-tokens"] = str(total_tokens)
    if section.context_length:
        arguments["--context-length"] = str(section.context_length)
    pairs = [part for pair in arguments.items() for part in pair]
    return [python, str(LAUNCHER), device, *pairs, *flags, *section.extra_args]


def environment(
    section: EngineSection, device: str, model_path: str, port: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The engine's environment. Variables of the service's own Python must not reach another interpreter."""
    variables = {name: value for name, value in inherited.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SGLANG_MAMBA_CONV_DTYPE": section.dtype,  # else bfloat16: decoding would round what a prefill does not
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "false",  # true: of temperature 1, whatever the tokens were sampled with
    }
    if Path(model_path).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        variables |= {
            "CUDA_VISIBLE_DEVICES": "",  # SGLang would choose code for a GPU that it sees
            "SGLANG_USE_CPU_ENGINE": "1",
            "PENSTOCK_PREFETCH": prefetch_address(port),
            "OMP_NUM_THREADS": str(section.num_threads),
            "MKL_NUM_THREADS": str(section.num_threads),
            "OMP_WAIT_POLICY": "passive",  # spinning threads made a small product 20 times slower while a trainer ran
            **KEEP_FREED_BYTES,
        }
    return variables
