"""What the launcher defines for an engine on a CPU, next to builds for CPUs and for CUDA. Packages are stand-ins."""

import subprocess
import sys
from pathlib import Path

import pytest

from penstock_rollout.engine.sglang.inside import launcher
from tests.patience import START_SECONDS

# As torchvision does: it gives operators that its library has defined a second implementation.
TORCHVISION = """
import torch
LOADS = torch.version.cuda is not None
if LOADS:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets
"""
NEEDS_A_DRIVER = "raise ImportError('libcuda.so.1: cannot open shared object file')"
SCRIPT = """
import importlib.util, sys, torch
torch.version.cuda = sys.argv[2] or None
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
launcher.define_missing_names()
import torchvision
assert torchvision.LOADS == bool(sys.argv[2])
assert hasattr(torch.ops.torchvision, "nms")
torch.cuda.synchronize()
from sgl_kernel import assign_req_to_token_pool_cpu
try:
    assign_req_to_token_pool_cpu()
except RuntimeError as error:
    print(error)
from sgl_kernel.mamba import chunk_gated_delta_rule_cpu
assert callable(torch.ops.sgl_kernel.fused_gdn_gating_cpu)
"""


@pytest.mark.parametrize("cuda", ["", "13.0"], ids=["torch-for-cpus", "torch-for-cuda"])
def test_an_engine_on_a_cpu_starts_with_packages_for_cuda(tmp_path: Path, cuda: str) -> None:
    (tmp_path / "torchvision.py").write_text(TORCHVISION)
    if cuda:
        (tmp_path / "sgl_kernel.py").write_text(NEEDS_A_DRIVER)
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, launcher.__file__, cuda],
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False, capture_output=True, text=True, timeout=START_SECONDS,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "sgl_kernel.assign_req_to_token_pool_cpu is not available on this CPU" in ran.stdout
