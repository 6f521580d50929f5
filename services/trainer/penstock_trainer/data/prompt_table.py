"""Training prompts on disk: one file that is written once and read a prompt at a time.

Owns the file, an Arrow file, and what is kept beside it. Invariants: a prompt that is read is the one that was written,
else the run ends with a DataError; a folder with a table's name holds a complete one. Memory does not grow with the
prompts, but for the list of the file's blocks, 1.5 bytes of a prompt.

    prompts.arrow    a row for each prompt: its record, the record's hash, and the hashes of its `CONTENTS`
    contents.json    `Contents`: what is known of all of them
"""

import logging
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, overload

import msgspec
import numpy as np
import pyarrow as pa
import xxhash

from penstock.durable import sync_folder, write_durably, writing
from penstock.errors import DataError
from penstock_trainer.data.prompt_lengths import SetLengths
from penstock_trainer.data.prompts import EncodedPrompt, PromptDigest
from penstock_trainer.data.rows import Message, Row
from penstock_trainer.data.shared_prompts import CONTENTS, hash_of
from penstock_trainer.data.token_ids import TokenIds

log = logging.getLogger(__name__)

TABLE, CONTENTS_FILE = "prompts.arrow", "contents.json"
UNFINISHED = ".unfinished"
UNFINISHED_SECONDS = 86_400.0  # without a change: then nobody writes it
BLOCK_ROWS = 16  # prompts that are read at once for one of them, in the event loop: some have a megabyte
COMPARED_BLOCKS = 256  # whose hashes are compared at once
FOLDER_KEY = "folder for the library `datasets` (HF_DATASETS_CACHE)"
SCHEMA = pa.schema([("record", pa.large_binary()), ("check", pa.uint64()), *((name, pa.uint64()) for name in CONTENTS)])


class RewardName(msgspec.Struct, frozen=True):
    """A reward that rows name, and the first of these rows. task: of reasoning-gym."""

    reward: str
    place: str
    task: str | None = None

    def row(self) -> Row:
        """A row that names it."""
        return Row("", "", self.reward, {} if self.task is None else {"task": self.task}, self.place)


class Contents(msgspec.Struct):
    """What is known of all prompts of a table.

    digest: as `prompts.digest`. set_sizes: prompts by the name of their set, in order. lengths: by the key of the set.
    with_template: names of the sets of which a prompt went through a chat template.
    """

    digest: str
    num_prompts: int
    set_sizes: dict[str, int]
    lengths: list[SetLengths]
    rewards: list[RewardName]
    with_template: list[str]
    told_apart_by_words: bool


class _Record(msgspec.Struct, array_like=True):
    """An `EncodedPrompt`; asked is None if it is the text."""

    text: str
    token_ids: bytes
    answer: str
    reward: str
    metadata: dict[str, Any]
    asked: str | list[Message] | None
    dataset: str


_encoder = msgspec.msgpack.Encoder(enc_hook=str)  # of what a message of a chat may hold beside text
_decoder = msgspec.msgpack.Decoder(_Record)


class PromptTable(Sequence[EncodedPrompt]):
    """The prompts of a table. Reading one costs a read of `BLOCK_ROWS`.

    An open table gives its prompts also when its folder is deleted; `with_hashes` needs the folder.
    """

    def __init__(self, folder: Path) -> None:
        """OSError, pa.ArrowException or msgspec.MsgspecError if it cannot be read."""
        self.folder = folder
        self.contents = msgspec.json.decode((folder / CONTENTS_FILE).read_bytes(), type=Contents)
        # Not mapped: a file that is cut under a mapping kills the process, without a word.
        self._reader = pa.ipc.open_file(pa.OSFile(str(folder / TABLE)))

    def __len__(self) -> int:
        return self.contents.num_prompts

    @overload
    def __getitem__(self, index: int) -> EncodedPrompt: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[EncodedPrompt]: ...

    def __getitem__(self, index: int | slice) -> EncodedPrompt | Sequence[EncodedPrompt]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        block, place = divmod(number, BLOCK_ROWS)
        return self._prompt(self._block(self._reader, block), place, number)

    def __iter__(self) -> Iterator[EncodedPrompt]:
        for block in range(self._reader.num_record_batches):
            found = self._block(self._reader, block)
            for place in range(found.num_rows):
                yield self._prompt(found, place, block * BLOCK_ROWS + place)

    @property
    def told_apart_by_words(self) -> bool:
        """Whether what prompts say tells them apart."""
        return self.contents.told_apart_by_words

    def with_hashes(self, content: str, hashes: Collection[int]) -> Iterator[EncodedPrompt]:
        """Those whose content, one of `CONTENTS`, has one of these hashes. Reads the hashes of all."""
        if not hashes:
            return
        wanted = np.fromiter(hashes, np.uint64, len(hashes))
        begin = 0
        for found in self._hashes(content):
            for place in np.flatnonzero(np.isin(found, wanted)).tolist():
                yield self[begin + place]
            begin += len(found)

    def _hashes(self, content: str) -> Iterator[Any]:
        """uint64[prompts of `COMPARED_BLOCKS` blocks], in order. Mapped, so that little else is read of the file."""
        options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(content)])
        with ExitStack() as stack:
            try:
                file = stack.enter_context(pa.memory_map(str(self.folder / TABLE)))
                reader = pa.ipc.open_file(file, options=options)
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(_reason(error)) from error
            numbers = range(reader.num_record_batches)
            for first in numbers[::COMPARED_BLOCKS]:
                blocks = [self._block(reader, number) for number in numbers[first : first + COMPARED_BLOCKS]]
                yield np.concatenate([block.column(content).to_numpy() for block in blocks])

    def _block(self, reader: Any, block: int) -> Any:
        try:
            return reader.get_batch(block)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(_reason(error)) from error

    def _prompt(self, block: Any, place: int, number: int) -> EncodedPrompt:
        record = block.column("record")[place].as_py()
        if xxhash.xxh3_64_intdigest(record) != block.column("check")[place].as_py():
            raise self._damaged(f"prompt {number} is not the one that was written")
        found = _decoder.decode(record)
        return EncodedPrompt(
            found.text,
            TokenIds.of_packed(found.token_ids),
            found.answer,
            found.reward,
            found.metadata,
            found.text if found.asked is None else found.asked,
            found.dataset,
        )

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"{self.folder / TABLE} is damaged ({reason}): expected the prompts that a trainer wrote there, and that "
            f"nothing changes it; delete {self.folder}, and the next start makes it again from the rows"
        )


def _reason(error: Exception) -> str:
    """Of Arrow, whose text for a file that cannot be opened is long, and begins with its path."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split())[:200]


def set_sizes(prompts: Sequence[EncodedPrompt]) -> dict[str, int]:
    """How many prompts each set has, by its name, in their order; the prompts of one set follow each other."""
    if isinstance(prompts, PromptTable):
        return prompts.contents.set_sizes
    return dict(Counter(prompt.dataset for prompt in prompts))


class TableWriter:
    """Writes a table; memory for the prompts of one block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _writing(path):
            self._file = pa.OSFile(str(path), "wb")
            self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._digest = PromptDigest()
        self._rows: list[tuple[bytes, int, *tuple[int, ...]]] = []
        self._set_sizes: dict[str, int] = {}
        self._has_no_words = self._has_no_tokens = False

    def add(self, prompt: EncodedPrompt) -> None:
        """The next prompt."""
        asked = None if prompt.asked == prompt.text else prompt.asked
        record = _encoder.encode(
            _Record(
                prompt.text, prompt.packed_ids, prompt.answer, prompt.reward, prompt.metadata, asked, prompt.dataset
            )
        )
        contents = {name: content(prompt) for name, content in CONTENTS.items()}
        self._has_no_words |= not contents["words"]
        self._has_no_tokens |= not contents["tokens"]
        self._rows.append((record, xxhash.xxh3_64_intdigest(record), *map(hash_of, contents.values())))
        self._digest.add(prompt)
        self._set_sizes[prompt.dataset] = self._set_sizes.get(prompt.dataset, 0) + 1
        if len(self._rows) == BLOCK_ROWS:
            self._write()

    def finish(self, lengths: list[SetLengths], rewards: list[RewardName], with_template: list[str]) -> Contents:
        """Write what is left, flush it, and say what all of it is."""
        if self._rows:
            self._write()
        with _writing(self._path):
            self._writer.close()
            self._file.close()
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        return Contents(
            self._digest.value,
            sum(self._set_sizes.values()),
            self._set_sizes,
            lengths,
            rewards,
            with_template,
            not self._has_no_tokens or self._words_tell_apart(),
        )

    def close(self) -> None:
        """Give the file up, if it is not finished."""
        with suppress(pa.ArrowException, OSError):
            self._writer.close()
            self._file.close()

    def _write(self) -> None:
        columns = zip(SCHEMA, zip(*self._rows, strict=True), strict=True)
        block = pa.record_batch([pa.array(values, field.type) for field, values in columns], schema=SCHEMA)
        with _writing(self._path):
            self._writer.write_batch(block)
        self._rows.clear()

    def _words_tell_apart(self) -> bool:
        """As `shared_prompts` asks of episodes. Holds eight bytes of each prompt, twice."""
        if self._has_no_words:
            return False
        hashes = np.empty((2, sum(self._set_sizes.values())), np.uint64)
        with pa.memory_map(str(self._path)) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                block = reader.get_batch(number)
                place = slice(number * BLOCK_ROWS, number * BLOCK_ROWS + block.num_rows)
                hashes[:, place] = block.column("words"), block.column("columns")
        words, columns = (np.unique(each).size for each in hashes)
        return bool(words >= columns)


class PromptTables:
    """The tables of a folder, each under its key: what it was made from (`table_key`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_cache(cls) -> "PromptTables":
        """Those in the cache folder of the library `datasets`, which also keeps what it has downloaded there."""
        import datasets

        return cls(Path(datasets.config.HF_DATASETS_CACHE) / "penstock")

    def find(self, key: str, fits: Callable[[Contents], bool]) -> PromptTable | None:
        """A table of this key of which `fits` is true; None if there is none, or it cannot be read."""
        for folder in sorted(self.folder.glob(f"{key}-*")):
            if folder.suffix == UNFINISHED:
                continue
            try:
                table = PromptTable(folder)
            except (OSError, pa.ArrowException, msgspec.MsgspecError) as error:
                log.warning("%s cannot be read (%s): its prompts are made again; delete it", folder, error)
                continue
            if fits(table.contents):
                return table
        return None

    @contextmanager
    def new(self, key: str) -> Iterator["NewTable"]:
        """Make a table; what is not kept is removed. PenstockError if there is no room or no right to write."""
        unfinished = self.folder / f"{key}-{secrets.token_hex(4)}{UNFINISHED}"
        with _writing(unfinished):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            unfinished.mkdir()
        try:
            table = NewTable(unfinished)
            try:
                yield table
            finally:
                table.writer.close()
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        """What trainers left that were killed while they wrote."""
        for folder in self.folder.glob(f"*{UNFINISHED}"):
            with suppress(OSError):
                changed = max(each.stat().st_mtime for each in (folder, *folder.iterdir()))
                if time.time() - changed > UNFINISHED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)


class NewTable:
    """A table that is written, under a name that no reader looks for until it is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.writer = TableWriter(folder / TABLE)

    def keep(self, contents: Contents) -> PromptTable:
        """Give a finished table its name, and open it."""
        write_durably(self._folder / CONTENTS_FILE, msgspec.json.encode(contents))
        kept = self._folder.with_suffix("")
        self._folder.rename(kept)
        sync_folder(kept.parent)
        return PromptTable(kept)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    with writing(f"{path}, the table of the training prompts,", FOLDER_KEY):
        yield
