"""The libraries' own switches for progress bars and chatter, which would stand between the lines of a log.

Invariant: set at the start of a process, before a library that reads them is imported. What is set already stays.
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
    """Let libraries that this process and its children import say nothing but errors."""
    for name, value in SWITCHES.items():
        environ.setdefault(name, value)
