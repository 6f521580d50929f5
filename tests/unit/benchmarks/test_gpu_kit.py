"""The kit for a GPU in its form for a CPU: its lines, its ends, its report, and the parts that need no engine."""

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.gpu import __main__ as kit
from benchmarks.gpu import learner, loop, part, pushes, rollout
from benchmarks.gpu.checks import config_of, groups_of
from benchmarks.gpu.kernels import divided, kernel_times
from benchmarks.gpu.machine import peak_tflops
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Recorder, lines_of, path_of
from benchmarks.gpu.report import failures, report
from benchmarks.gpu.shapes import Work, asked_work, packed_work, save_random, shapes
from benchmarks.learner_cases import ragged_case
from penstock_trainer.batching.batch import make_batch
from penstock_trainer.batching.packing import make_packs
from penstock_trainer.learner.recipe import make_recipe
from tests.patience import ANSWER_SECONDS, START_SECONDS

ROOT = Path(__file__).parents[3]
PAUSE_SECONDS = 0.2


def options_for(folder: Path) -> Options:
    return Options(folder, 5.0, True, None, None, (), None, 0.1)


def figures(lines: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {(line["case"], line["name"]): line["value"] for line in lines if line["kind"] == "figure"}


def run_kit(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=2 * START_SECONDS, errors="replace"
    )


def test_checks_pass_and_end(tmp_path: Path) -> None:
    done = run_kit("checks", "--cpu", "--out", tmp_path, "--minutes", 5)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lines_of(tmp_path, "checks")
    assert [lines[0]["kind"], lines[-1]["kind"], lines[-1]["state"]] == ["facts", "end", "done"]
    assert lines[0]["torch"] == torch.__version__
    checks = [line for line in lines if line["kind"] == "figure"]
    assert all(line["passed"] and math.isfinite(line["value"]) for line in checks)
    kinds = {line["case"].partition(",")[0] for line in checks}
    assert kinds == {"attention", "head in chunks", "learner", "weights", "deltas"}
    assert f"{len(checks)} of {len(checks)} checks passed." in done.stdout
    assert done.stdout.rstrip().endswith(run_kit("report", tmp_path).stdout.rstrip())


def test_the_learner_is_measured_on_all_sides(tmp_path: Path) -> None:
    record = Recorder(tmp_path, "learner", 5)
    learner.run(options_for(tmp_path), record)
    found = figures(lines_of(tmp_path, "learner"))
    for side in ("packed tries", "full sequences", "padded"):
        for name in ("first step", "step", "trained tokens per second", "model FLOPs utilisation"):
            assert 0 < found[f"tiny, {side}", name] < math.inf
    assert found["tiny, packed tries", "rows computed per row asked for"] < 0.8
    assert found["tiny, full sequences", "rows computed per row asked for"] == pytest.approx(1, abs=0.02)
    assert 0 < found["tiny, packed tries, profile", "matrix products"] < 1
    assert failures({"learner": [*lines_of(tmp_path, "learner"), {"kind": "end", "state": "done"}]}) == []


@pytest.mark.parametrize("measured", [rollout, pushes, loop])
def test_what_is_missing_is_named(tmp_path: Path, measured: Any) -> None:
    name = measured.__name__.rpartition(".")[2]
    measured.run(options_for(tmp_path), Recorder(tmp_path, name, 5))
    [skipped] = lines_of(tmp_path, name)
    assert (skipped["kind"], "give --engine-python" in skipped["reason"]) == ("skipped", True)
    assert f"not measured: {name}: no Python interpreter with SGLang" in report({name: [skipped]})
    options = replace(options_for(tmp_path), cpu=False, engine_python=Path(sys.executable))
    if measured is not pushes:  # whose models are random
        measured.run(options, Recorder(tmp_path, name, 5))
        assert "give --model" in lines_of(tmp_path, name)[0]["reason"]


def test_of_two_gpus_the_engine_of_each_model_sees_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    async def measure(_: Options, __: Recorder, name: str, ___: Path, *, two: bool) -> None:
        seen.append((name, two, os.environ["CUDA_VISIBLE_DEVICES"]))

    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(pushes, "measure", measure)
    options = replace(options_for(tmp_path), cpu=False, engine_python=Path(sys.executable))
    pushes.run(options, Recorder(tmp_path, "pushes", 5))
    assert seen == [("135M", True, "5"), ("1B", True, "5")]


@pytest.mark.parametrize("is_seen", [True, False])
async def test_a_pause_after_the_completion_is_noted(is_seen: bool) -> None:
    """The completion waits for the push, or is over before the push is."""
    goes_on, is_over, is_closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def complete(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        token = b"data: {}\n\n"
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (20 * len(token)))
        for number in range(20):
            if number == pushes.TOKENS_BEFORE and is_seen:
                await goes_on.wait()
            writer.write(token)
            await writer.drain()
        await reader.read()
        is_over.set()  # the client has gone
        writer.close()
        await writer.wait_closed()
        is_closed.set()

    async def push() -> None:
        if not is_seen:
            await is_over.wait()
        await asyncio.sleep(PAUSE_SECONDS)
        goes_on.set()

    async with await asyncio.start_server(complete, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with asyncio.timeout(ANSWER_SECONDS):
            gap, note = await pushes.pause_seen(f"http://127.0.0.1:{port}", push)
            await is_closed.wait()
    assert not is_seen or gap > PAUSE_SECONDS / 2
    assert ("ended before the push" in note) != is_seen


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["part", "checks", "--out", str(tmp_path)])
    assert part.main() == 0
    skipped, end = lines_of(tmp_path, "checks")
    assert "torch sees no GPU; give --cpu" in skipped["reason"]
    assert end["state"] == "done"


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = run_kit("chekcs", "--out", tmp_path)
    assert done.returncode == 2
    assert "no part is named 'chekcs': expected some of checks, learner" in done.stderr


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for option in ("--model", "--engine-python", "--gsm8k"):
        done = run_kit("checks", "--cpu", "--out", tmp_path, option, tmp_path / "nowhere")
        assert (done.returncode, f"{option} is {tmp_path}/nowhere: nothing is there" in done.stderr) == (2, True)


def test_a_part_that_does_not_end_is_killed_and_keeps_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorder(tmp_path, "checks", 1).figure("case", "name", 1.5, "s")
    written = path_of(tmp_path, "checks").rename(tmp_path / "written")
    part = tmp_path / "python"
    part.write_text(f"#!/bin/sh\ncat {written} > {path_of(tmp_path, 'checks')}\nexec sleep 600\n")
    part.chmod(0o755)

    class Hanging(subprocess.Popen[bytes]):
        """Its time is over as soon as it has written its line."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            deadline = time.monotonic() + ANSWER_SECONDS
            while not lines_of(tmp_path, "checks") and time.monotonic() < deadline:
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(sys, "executable", str(part))
    monkeypatch.setattr(subprocess, "Popen", Hanging)
    monkeypatch.setattr(sys, "argv", ["gpu", "checks", "--cpu", "--out", str(tmp_path)])
    assert kit.main() == 1
    lines = lines_of(tmp_path, "checks")
    assert figures(lines[:-1]) == {("case", "name"): 1.5}
    assert (lines[-1]["kind"], lines[-1]["state"]) == ("end", "killed")


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    record = Recorder(tmp_path, "checks", 1)
    record.figure("case", "name", 1.5, "s")
    with path_of(tmp_path, "checks").open("a") as file:
        file.write('{"part": "checks", "kind": "fig')
    assert figures(lines_of(tmp_path, "checks")) == {("case", "name"): 1.5}
    assert failures({"checks": lines_of(tmp_path, "checks")}) == ["checks: it has no end"]


def test_errors_and_values_that_are_not_finite_are_checks_that_failed(tmp_path: Path) -> None:
    record = Recorder(tmp_path, "checks", 1)
    record.figure("attention", "output", math.nan, limit=0.1)
    record.figure("attention", "gradients", 0.2, limit=0.1)
    record.figure("attention", "graphs", 3, limit=3)
    with record.attempt("head"):
        raise RuntimeError("out of resource: shared memory")
    record.end("done")
    lines = lines_of(tmp_path, "checks")
    assert json.loads(path_of(tmp_path, "checks").read_text().splitlines()[0])["value"] is None
    assert len(failures({"checks": lines})) == 3
    text = report({"checks": lines, "learner": []})
    assert "1 of 4 checks passed." in text
    assert "RuntimeError: out of resource: shared memory" in text
    assert "| attention | gradients | 0.2 | at most 0.1: **failed** |" in text


def test_a_case_that_needs_more_time_than_is_left_is_skipped(tmp_path: Path) -> None:
    record = Recorder(tmp_path, "learner", 1)
    assert record.has_time("small", 1)
    assert not record.has_time("large", 61)
    [line] = lines_of(tmp_path, "learner")
    assert (line["kind"], line["case"], "give --minutes" in line["reason"]) == ("skipped", "large", True)


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    [shape] = shapes(cpu=True)
    model = AutoModelForCausalLM.from_pretrained(save_random(shape, tmp_path, "cpu"), dtype=torch.float32)
    counted = FlopCounterMode(display=False)
    with counted:
        model(input_ids=torch.arange(20)[None], use_cache=False).logits.sum().backward()
    assert Work(20, 0, 20).flops(shape.config) == counted.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = Work(0, 100, 0).flops(shape.config)
    assert attention == 3 * 4 * 2 * 4 * 16 * 100  # layers, heads, size of a head


def test_sequences_that_share_nothing_are_packed_in_full() -> None:
    case = ragged_case(2)
    rules = make_recipe(config_of(Path("unused"), "float32")).rules
    asked = asked_work(case)
    works = [
        packed_work(make_packs(make_batch(groups_of(case, shared=shared), rules, version=0).samples, 10**6))
        for shared in (True, False)
    ]
    assert [work.head_rows for work in works] == pytest.approx([asked.head_rows] * 2, rel=0.05)
    assert works[0].rows < 0.8 * asked.rows
    assert works[1].rows == asked.rows + len(case.prompts)  # each group has one token in common
    assert works[1].pairs > works[0].pairs


def test_the_time_of_kernels_is_divided_by_their_names() -> None:
    times = {
        "nvjet_tst_128x256_64x4": 50.0,
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>": 10.0,
        "triton_tem_fused_flex_attention_0": 20.0,
        "void at::native::vectorized_elementwise_kernel": 15.0,
        "Memcpy HtoD": 5.0,
    }
    seen = divided(times, 200.0)
    assert (seen.matrix, seen.attention, seen.busy) == (0.6, 0.2, 0.5)
    assert seen.top_others == (("void at::native::vectorized_elementwise_kernel", 0.15), ("Memcpy HtoD", 0.05))


def test_an_annotation_is_no_kernel() -> None:
    """Its time on a GPU is that of the kernels within it."""
    averages = [
        SimpleNamespace(key=key, device_type=device, is_user_annotation=annotation, self_device_time_total=5.0)
        for key, device, annotation in (
            ("nvjet_tst", DeviceType.CUDA, False),
            ("Optimizer.step#AdamW.step", DeviceType.CUDA, True),
            ("aten::mm", DeviceType.CPU, False),
        )
    ]
    assert kernel_times(averages) == {"nvjet_tst": 5.0}


def test_the_peak_is_that_of_the_gpu_by_its_name() -> None:
    assert peak_tflops("NVIDIA H200") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA GeForce RTX 4090") == 165.0
    assert peak_tflops("Voodoo 2") is None
