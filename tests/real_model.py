"""The model of the examples, for tests of a real tokenizer and its template."""

from pathlib import Path

from examples.demo.prepare import COMPLETE

FOLDER = Path(__file__).parents[1] / "models/SmolLM2-135M-Instruct"


def real_model() -> Path:
    """Its folder. `make test` and `make check` fetch it first; a test fails if it is not there."""
    if not (FOLDER / COMPLETE).is_file():
        raise AssertionError(
            f"{FOLDER} holds no model; `make {FOLDER.relative_to(FOLDER.parents[1])}/{COMPLETE}` fetches it"
        )
    return FOLDER
