"""What a delta costs against a full version: its share of the bytes, and the seconds to write and to apply it.

`.venv/bin/python -m benchmarks.weight_delta` trains SmolLM2-135M on text with AdamW at several learning rates. It
stages each step both ways, through the product's own staging and local copy. The raw rows only write and read the bytes
of the full file, in the same folder and the same run.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.contracts import Dtype
from penstock.weights.local_folder import LocalFolder, shared_memory
from penstock.weights.manifest import read_manifest, verify
from penstock_rollout.weights.local_copy import LocalCopy
from penstock_trainer.weights.deltas import DeltaWriter
from penstock_trainer.weights.files import WEIGHTS_NAME, Format, Weights, published_weights
from penstock_trainer.weights.hugging_face import config_json
from penstock_trainer.weights.staging import Staging, WeightsSource

MODEL = Path("models/SmolLM2-135M-Instruct")
TEXT = Path(__file__).parents[1] / "docs"
NUM_SEQUENCES, NUM_TOKENS = 4, 128  # of a step


@dataclass
class Trained:
    """A model that takes AdamW steps on a language-modelling loss: every weight has a gradient, as in a real batch."""

    model: Any
    token_ids: torch.Tensor
    lr: float
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, betas=(0.9, 0.999), weight_decay=0.0)

    def step(self) -> None:
        starts = torch.randint(0, len(self.token_ids) - NUM_TOKENS, (NUM_SEQUENCES,))
        batch = torch.stack([self.token_ids[start : start + NUM_TOKENS] for start in starts])
        self.model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> Weights:
        return published_weights(self.model)

    def config_json(self, dtype: Dtype) -> bytes:
        return config_json(self.model, dtype)


class Trainable(WeightsSource, Protocol):
    """A source of weights that can take a step."""

    def step(self) -> None: ...


class Rows:
    """Seconds and figures by name."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def timed(self, name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        self.add(name, time.perf_counter() - start)
        return result

    def lines(self) -> Iterator[str]:
        for name, values in self.values.items():
            yield f"| {name} | {statistics.median(values):.4f} | {min(values):.4f} | {max(values):.4f} |"


def measure(source: Trainable, folder: Path, dtype: Dtype, num_steps: int) -> Rows:
    """Stage `num_steps` steps both ways; the versions before the first step are not counted."""
    form = Format(dtype, "dithered")
    rows = Rows()

    def claim(name: str) -> Callable[[int], LocalFolder]:
        return lambda num_bytes: LocalFolder(name, num_bytes, str(folder / "local"))

    full = Staging(source, folder / "full", form)
    deltas = Staging(source, folder / "delta", form, deltas=DeltaWriter(claim("trainer"), form, num_steps + 2))
    copy, joiner = LocalCopy(claim("rollout")), LocalCopy(claim("rollout"))
    for version in range(num_steps + 1):
        if version:
            source.step()
        (rows if version else Rows()).timed("write full, s", partial(full.write, version, 1))
        (rows if version else Rows()).timed("write delta, s", partial(deltas.write, version, 1))
        staged, present = deltas.folder_of(version, 1), full.folder_of(version, 1)
        manifest = read_manifest(staged)
        (rows if version else Rows()).timed("read and apply delta, s", partial(copy.bring, staged, manifest))
        rows.timed("read and verify full, s", partial(verify, present, read_manifest(present)))
        if manifest.delta is not None:
            rows.add("delta / full, bytes", manifest.delta.num_bytes / manifest.files[WEIGHTS_NAME])
            rows.add("tensors that changed", len(manifest.delta.tensors) / len(manifest.tensors))
        rows.timed("write raw, s", partial(_write_raw, present / WEIGHTS_NAME, folder / "raw"))
        rows.timed("read raw, s", (folder / "raw").read_bytes)
    rows.timed("join: copy and verify full, apply all deltas, s", partial(joiner.bring, staged, manifest))
    for each in (copy, joiner, full, deltas):
        each.close()
    return rows


def _write_raw(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = "\n".join(path.read_text() for path in sorted(TEXT.glob("*.md")))
    token_ids = torch.tensor(tokenizer(text)["input_ids"])
    for lr in arguments.lr:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        with tempfile.TemporaryDirectory(dir=shared_memory(2**33)) as folder:
            rows = measure(Trained(model, token_ids, lr), Path(folder), arguments.dtype, arguments.steps)
        print(f"\nlr {lr:g}, {arguments.dtype}, {arguments.steps} steps\n\n| | median | least | most |")
        print("| --- | ---: | ---: | ---: |")
        print("\n".join(rows.lines()), flush=True)


if __name__ == "__main__":
    main()
