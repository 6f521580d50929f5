"""Token ids as the text of each: decoded from what was recorded, with special tokens as they are.

Owns where the tokenizer of a run is looked for: in the folder that its configuration names, or among the files that
this host has of a hub's model. Invariant: nothing is fetched; without a tokenizer ids stay ids, and `reason` says why.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOKENIZER_FILE = "tokenizer.json"


class Pieces:
    """The tokenizer of a run, loaded when it is first needed."""

    def __init__(self, config: Mapping[str, Any], folder: Path | None = None) -> None:
        """`folder`: of a model, in place of the one that the configuration names."""
        actor = config.get("actor")
        named = str(actor.get("path", "")) if isinstance(actor, Mapping) else ""
        self._model = str(folder) if folder is not None else named
        self._tokenizer: Any = None
        self._special: frozenset[int] = frozenset()
        self._is_loaded = False
        self.reason = ""
        """Why there is no tokenizer; empty if there is one, or if none was needed yet."""

    def of(self, ids: Sequence[int]) -> list[str] | None:
        """The text that each id adds; None without a tokenizer.

        The bytes of one character may be spread over several tokens: the last one of them has the character.
        """
        if not self._load():
            return None
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        pieces: list[str] = []
        for each in ids:
            try:
                pieces.append(stream.step(self._tokenizer, each) or "")
            except Exception:  # the library's own, for bytes that are no text
                stream = DecodeStream(skip_special_tokens=False)
                pieces.append("\N{REPLACEMENT CHARACTER}")
        return pieces

    def texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence, with special tokens; without a tokenizer its ids."""
        if not self._load():
            return [" ".join(map(str, ids)) for ids in sequences]
        texts: list[str] = self._tokenizer.decode_batch([list(ids) for ids in sequences], skip_special_tokens=False)
        return texts

    def special(self, ids: Sequence[int]) -> list[int]:
        """Places of special tokens."""
        return [place for place, each in enumerate(ids) if each in self._special] if self._load() else []

    def _load(self) -> bool:
        if not self._is_loaded:
            self._is_loaded = True
            self._tokenizer, self.reason = _loaded(self._model)
            if self._tokenizer is not None:
                added = self._tokenizer.get_added_tokens_decoder()
                self._special = frozenset(number for number, token in added.items() if token.special)
        return self._tokenizer is not None


def _loaded(model: str) -> tuple[Any, str]:
    """The tokenizer, or why there is none."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None, "the package tokenizers is not installed: pip install 'penstock[view]'"
    path = _file_of(model)
    if path is None:
        return None, f"the model {model!r} has no {TOKENIZER_FILE} here: penstock view --tokenizer FOLDER"
    try:
        return Tokenizer.from_file(str(path)), ""
    except Exception as error:  # the library raises Exception itself
        return None, f"{path} cannot be read ({error}): expected the file of a fast tokenizer"


def _file_of(model: str) -> Path | None:
    path = Path(model) / TOKENIZER_FILE
    if path.is_file():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, TOKENIZER_FILE)
    except (ImportError, ValueError):  # it is no name of a hub's model
        return None
    return Path(cached) if isinstance(cached, str) else None
