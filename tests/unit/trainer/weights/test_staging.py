"""Rounding, staging and the manifest: properties, the round trip, and the detection of every kind of damage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from penstock.errors import WeightsError
from penstock.weights.local_folder import is_memory_backed
from penstock.weights.manifest import MANIFEST_NAME, read_manifest, verify
from penstock_trainer.weights.files import Format, LiveWeights
from penstock_trainer.weights.rounding import CHUNK_LENGTH, PATTERN_LENGTH, Dither, dither_offsets, published_chunks
from penstock_trainer.weights.staging import Staging, default_folder

CPU = torch.device("cpu")
BF16 = Format("bfloat16", "dithered")


def round_dithered(values: Tensor) -> Tensor:
    return Dither(CPU).round(values)


def chunks(weight: Tensor, dtype: torch.dtype, dither: Dither | None, length: int) -> Tensor:
    return torch.cat([chunk.clone() for chunk in published_chunks(weight, dtype, dither, length)])


class Source:
    """Weights in a dictionary of the test."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.held: dict[str, Tensor] = {
            "model.embed.weight": torch.randn(300, 300, generator=generator),
            "model.norm.weight": torch.ones(17),
            "model.scalar": torch.tensor(2.5),
            "model.transposed": torch.randn(5, 7, generator=generator).t(),
        }

    def weights(self) -> LiveWeights:
        return LiveWeights(self.held)

    def config_json(self, dtype: str) -> bytes:
        return json.dumps({"dtype": dtype}).encode()


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def staged(source: Source, tmp_path: Path) -> Path:
    """The folder of a staged version 3."""
    staging = Staging(source, tmp_path / "weights", BF16)
    staging.write(3, lease=1)
    return staging.folder_of(3, lease=1)


def test_offsets_hold_every_16_bit_number_once() -> None:
    assert sorted(dither_offsets(CPU).tolist()) == list(range(PATTERN_LENGTH))


def test_every_bfloat16_stays_itself() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = patterns.view(torch.bfloat16)
    rounded = round_dithered(values.float())
    finite = torch.isfinite(values)
    assert torch.equal(rounded[finite].view(torch.int16), patterns[finite])
    assert torch.equal(torch.isnan(rounded), torch.isnan(values))
    assert torch.equal(torch.isinf(rounded), torch.isinf(values))


def test_rounding_is_unbiased_over_a_tile_and_repeatable() -> None:
    for value in (1.0 + 1e-4, -0.3, 1e-3, -7.7e8):
        values = torch.full((PATTERN_LENGTH,), value)
        rounded = round_dithered(values)
        step = 2.0**-7 * abs(value)
        assert abs(rounded.double().mean().item() - values[0].item()) < step * 2e-5
        assert len(rounded.unique()) == 2
        assert torch.equal(rounded, round_dithered(values))


def test_small_updates_show_where_nearest_hides_them() -> None:
    before = torch.randn(PATTERN_LENGTH, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    after = before * (1 + 2.0**-12)  # an eighth of the smallest half step
    assert torch.equal(after.bfloat16().float(), before)
    moved = (round_dithered(after).float() != before).float().mean().item()
    assert 0.02 < moved < 0.07
    assert round_dithered(after).double().abs().sum() > before.double().abs().sum()


def test_extremes_stay_finite_and_non_finite_stays() -> None:
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([largest, -largest, torch.inf, -torch.inf, torch.nan, 1.0, 0.0, -0.0, 1e-45])
    rounded = round_dithered(values)
    assert rounded[:2].tolist() == [torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min]
    assert rounded[2:4].tolist() == [torch.inf, -torch.inf]
    assert rounded[4].isnan()
    assert rounded[5:8].tolist() == [1.0, 0.0, -0.0]
    only_low_bits = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # a nan that truncation makes inf
    assert round_dithered(only_low_bits).isnan().all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64))
def test_rounding_moves_less_than_one_step(numbers: list[float]) -> None:
    values = torch.tensor(numbers)
    rounded = round_dithered(values).float()
    truncated = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    above = ((truncated.view(torch.int32) + 0x10000).view(torch.float32)).where(truncated != values, truncated)
    assert bool(((rounded == truncated) | (rounded == above) | ~torch.isfinite(above)).all())


@pytest.mark.parametrize("length", [CHUNK_LENGTH, PATTERN_LENGTH])
def test_published_chunks_repeat_the_pattern_and_keep_float32(length: int) -> None:
    weight = torch.randn(2 * CHUNK_LENGTH + 100)
    rounded = chunks(weight, torch.bfloat16, Dither(CPU), length)
    patterns = [round_dithered(piece) for piece in weight.split(PATTERN_LENGTH)]
    assert torch.equal(rounded, torch.cat(patterns))
    assert torch.equal(chunks(weight, torch.bfloat16, None, length), weight.bfloat16())
    assert torch.equal(chunks(weight, torch.float32, Dither(CPU), length), weight)
    sizes = [chunk.numel() for chunk in published_chunks(weight, torch.float32, None, length)]
    assert set(sizes) == {length, 100}


@pytest.mark.parametrize("form", [BF16, Format("bfloat16", "nearest"), Format("float32", "dithered")])
def test_staged_version_verifies_and_loads(source: Source, tmp_path: Path, form: Format) -> None:
    staging = Staging(source, tmp_path / "weights", form)
    expected = staging.digest(4)
    identity = staging.write(4, lease=2)
    folder = staging.folder_of(4, lease=2)
    manifest = read_manifest(folder)
    verify(folder, manifest)
    assert identity == manifest.identity == expected
    assert (manifest.version, manifest.lease, manifest.dtype) == (4, 2, form.dtype)
    loaded = load_file(folder / "model.safetensors")
    for name, weight in source.held.items():
        assert loaded[name].shape == weight.shape
        assert loaded[name].dtype == form.torch_dtype
        torch.testing.assert_close(loaded[name].float(), weight, rtol=2.0**-7, atol=0)
    assert json.loads((folder / "config.json").read_text()) == {"dtype": form.dtype}


def test_equal_weights_have_equal_digests_and_others_have_not(source: Source, tmp_path: Path) -> None:
    staging = Staging(source, tmp_path, BF16)
    first, second = staging.write(0, 1), staging.write(1, 1)
    source.held["model.norm.weight"] = torch.full((17,), 1.0078125)
    assert first.digest == second.digest != staging.write(2, 1).digest


def test_last_versions_are_kept_and_left_overs_removed(source: Source, tmp_path: Path) -> None:
    (tmp_path / ".staging-00000009.1").mkdir()
    staging = Staging(source, tmp_path, BF16, keep=2)
    for version in range(4):
        staging.write(version, lease=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002.1", "00000003.1"]
    staging.write(3, lease=2)  # another life of the trainer stages the same version
    staging.write(3, lease=2)
    verify(staging.folder_of(3, 2), read_manifest(staging.folder_of(3, 2)))
    staging.prune({3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003.1", "00000003.2"]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_flipped_bit_is_seen_and_named(staged: Path) -> None:
    flip(staged / "model.safetensors", -1)
    with pytest.raises(WeightsError, match=r"tensor model\.transposed has digest"):
        verify(staged, read_manifest(staged))


def test_damaged_header_is_seen(staged: Path) -> None:
    for position in (0, 7, 8, 20):
        damaged = staged.with_name(f"damaged-{position}")
        shutil.copytree(staged, damaged)
        flip(damaged / "model.safetensors", position)
        with pytest.raises(WeightsError):
            verify(damaged, read_manifest(damaged))


def test_truncated_and_missing_files_are_seen(staged: Path) -> None:
    weights = staged / "model.safetensors"
    manifest = read_manifest(staged)
    data = weights.read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        weights.write_bytes(data[:size])
        with pytest.raises(WeightsError, match="expected"):
            verify(staged, manifest)
    weights.unlink()
    with pytest.raises(WeightsError, match="expected"):
        verify(staged, manifest)


def test_file_that_an_engine_would_load_too_is_seen(staged: Path) -> None:
    (staged / "extra.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"extra\.safetensors"):
        verify(staged, read_manifest(staged))


def test_truncated_manifest_is_refused(staged: Path) -> None:
    path = staged / MANIFEST_NAME
    data = path.read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], b"", data.replace(b"weights-manifest/1", b"weights-manifest/9")):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match="not a manifest of schema weights-manifest/1"):
            read_manifest(staged)
    path.unlink()
    with pytest.raises(WeightsError, match=r"cannot be read.*weights\.folder"):
        read_manifest(staged)


def test_manifest_of_other_tensors_is_refused(staged: Path) -> None:
    text = (staged / MANIFEST_NAME).read_text()
    changes = {
        '"model.scalar"': '"model.other"',
        '"shape":[17]': '"shape":[16]',
        '"BF16"': '"F16"',
        '"file":"model.safetensors"': '"file":"other.safetensors"',
        f'"digest":"{read_manifest(staged).digest}"': '"digest":"0000000000000000"',
    }
    for old, new in changes.items():
        assert old in text
        (staged / MANIFEST_NAME).write_text(text.replace(old, new))
        with pytest.raises(WeightsError):
            verify(staged, read_manifest(staged))


def test_default_folder_needs_room(tmp_path: Path) -> None:
    assert default_folder("run", tmp_path, needed_bytes=2**62) == tmp_path / "weights"
    assert not is_memory_backed(Path("/proc"))
