"""Starts SGLang so that it runs well on plain CPUs and leaves no process behind.

Owns what must happen inside SGLang's own environment. This file is a script for that environment's interpreter and
imports nothing of Penstock. Every process that SGLang spawns runs it again (the "spawn" start method imports the main
script as `__mp_main__`), so its module level does what each process needs:

1. The process dies with its parent, so a killed service leaves neither processes nor memory. (The first process is tied
   by `penstock.runtime.process.tied_command`, which starts this script.)
2. On a CPU, it defines names that SGLang imports but never uses there: operators of torchvision, whose PyPI build needs
   a torch for CUDA, and `sgl_kernel`, which needs AMX or (next to a torch for CUDA) a driver. Of `sgl_kernel`, it also
   defines what GatedDeltaNet uses (`gated_delta`). It removes the wait for a GPU from SGLang's checksums of weights.
3. On a CPU, it registers hooks for prefetching weights, batched attention, prefill of equal prompts, receiving weights,
   seeded sampling, recorded experts and gated norms (`prefetch`, `attention`, `prefill`, `receive`, `sampling`,
   `experts`, `gated_delta`) in SGLang's own hook registry. The scheduler applies them before it loads the model.
4. On a GPU, the first process lets SGLang find the compiler that pip has installed (`toolkit`).

Started as: python launcher.py DEVICE [arguments of sglang.launch_server]
"""

import ctypes
import importlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
MAMBA = "sgl_kernel.mamba"

# SGLang imports these names for speculative decoding and cache copies, which Penstock never turns on.
SGL_KERNEL_NAMES = (
    "copy_all_layer_kv_cache_cpu",
    "assign_req_to_token_pool_cpu",
    "rotate_input_ids_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_tree_kernel_efficient_cpu",
    "verify_tree_greedy_cpu",
)


def die_with(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent ends; exit at once if it has already ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed: the engine could outlive its service")
    if os.getppid() != parent_pid:
        sys.exit(f"engine launcher: parent {parent_pid} is gone: not starting")


def _absent(name: str) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"sgl_kernel.{name} is not available on this CPU (it needs the AMX build of sgl-kernel)")

    return call


def define_missing_names() -> None:
    """Define what SGLang imports but cannot use on a CPU; a call raises an error that names the function."""
    import torch

    if not _imports("torchvision"):
        torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if torch.version.cuda is not None or importlib.util.find_spec("sgl_kernel") is None:
        stub = types.ModuleType("sgl_kernel")
        for name in SGL_KERNEL_NAMES:
            setattr(stub, name, _absent(name))
        sys.modules["sgl_kernel"] = stub
        sys.modules[MAMBA] = _beside("gated_delta").define(stub)
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None


def _imports(name: str) -> bool:
    """Whether a package can be imported. If not, nothing of it is left, so that it can be imported later."""
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):
        for module in [each for each in sys.modules if each.partition(".")[0] == name]:
            del sys.modules[module]
        return False
    return True


def register_hooks() -> None:
    """Register the CPU hooks in SGLang; each process that needs them applies them itself."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    prefetch, attention, prefill, receive, sampling, experts, gated_delta = map(
        _beside, ("prefetch", "attention", "prefill", "receive", "sampling", "experts", "gated_delta")
    )
    for target, hook in {
        **prefetch.hooks(),
        **attention.hooks(),
        **prefill.hooks(),
        **receive.hooks(),
        **experts.hooks(),
        **(gated_delta.hooks() if MAMBA in sys.modules else {}),  # SGLang has its own where it has AMX
        **sampling.around_hooks(),
    }.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    for target, hook in sampling.after_hooks().items():
        HookRegistry.register(target, hook, HookType.AFTER)


def _beside(name: str) -> Any:
    """A module of this folder, loaded by its file: the folder must not be on SGLang's import path."""
    spec = importlib.util.spec_from_file_location(f"penstock_{name}", Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py is missing next to {__file__}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(device: str) -> None:
    """What every process of the server does before it imports SGLang."""
    own_folder = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != own_folder]
    if device == "cpu":
        define_missing_names()
        register_hooks()


def find_compiler() -> None:
    """Name the compiler of this environment to SGLang and to every process that it starts."""
    packages = Path(sysconfig.get_path("purelib"))
    os.environ.update(_beside("toolkit").variables(os.environ, packages, Path(sys.executable).parent))


def serve(arguments: list[str]) -> None:
    """Run SGLang's server until it ends; then its children end too."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__mp_main__":
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and sys.platform == "linux":
        die_with(parent.pid)
    prepare(sys.argv[1])

if __name__ == "__main__":
    prepare(sys.argv[1])
    if sys.argv[1] != "cpu":
        find_compiler()
    serve(sys.argv[2:])
