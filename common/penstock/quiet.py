"""The libraries' own switches for progress bars and chatter, which would interrupt the lines of a log.

Invariant: set at the start of a process, before the import of a library that reads them. A variable that is already set
keeps its value.
"""

from collections.abc import MutableMapping

SWITCHES = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quiet_libraries(environ: MutableMapping[str, str]) -> None:
    """Limit the libraries that this process and its children import to errors."""
    for name, value in SWITCHES.items():
        environ.setdefault(name, value)
