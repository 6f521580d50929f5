"""The list of a version's chunks."""

from pathlib import Path

import msgspec
import pytest
import xxhash

from penstock.errors import WeightsError
from penstock.weights.chunks import (
    LEAST_CHUNK_BYTES,
    MOST_CHUNK_BYTES,
    ChunkedFile,
    ChunkList,
    decode_list,
    encode_list,
    list_chunks,
)


def version(folder: Path, num_bytes: int) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_bytes(b"{}")
    (folder / "config.json").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(bytes(range(251)) * (num_bytes // 251 + 1))
    (folder / ".lock").write_bytes(b"not of the version")
    return folder


@pytest.mark.parametrize("num_bytes", [10, LEAST_CHUNK_BYTES * 3, LEAST_CHUNK_BYTES * 300])
def test_the_chunks_of_a_list_are_the_bytes_of_its_files(tmp_path: Path, num_bytes: int) -> None:
    folder = version(tmp_path / "version", num_bytes)
    listed = list_chunks(folder)
    assert [file.name for file in listed.files] == ["manifest.json", "config.json", "model.safetensors"]
    found: dict[str, bytes] = {file.name: b"" for file in listed.files}
    for chunk in listed.chunks:
        data = (folder / chunk.file).read_bytes()[chunk.start : chunk.start + chunk.num_bytes]
        assert (len(data), xxhash.xxh3_64_hexdigest(data)) == (chunk.num_bytes, chunk.digest)
        found[chunk.file] += data
    assert found == {name: (folder / name).read_bytes() for name in found}
    assert LEAST_CHUNK_BYTES <= listed.chunk_bytes <= MOST_CHUNK_BYTES
    assert decode_list(*encode_list(listed)) == listed


def test_only_the_list_of_the_digest_is_taken(tmp_path: Path) -> None:
    data, digest = encode_list(list_chunks(version(tmp_path / "version", 10)))
    with pytest.raises(WeightsError, match=f"expected {digest}"):
        decode_list(data + b" ", digest)
    other = b"[1, 2]"
    with pytest.raises(WeightsError, match="one release"):
        decode_list(other, xxhash.xxh3_64_hexdigest(other))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", ".lock", "a/b", "", "a\n"])
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    data = msgspec.json.encode(ChunkList(10, (ChunkedFile(name, 10),), ("0" * 16,)))
    with pytest.raises(WeightsError, match="one release"):
        decode_list(data, xxhash.xxh3_64_hexdigest(data))


def test_a_list_has_a_digest_for_each_chunk() -> None:
    with pytest.raises(ValueError, match="1 digests: expected 2"):
        ChunkList(10, (ChunkedFile("model.safetensors", 11),), ("0" * 16,))
