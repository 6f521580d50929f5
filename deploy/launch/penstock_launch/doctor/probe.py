"""Runs inside an interpreter that is looked at (`python -c <this text> NAME ...`), with its standard library alone.

Prints what the interpreter has as lines of JSON, each with all of the earlier ones: if the import of torch crashes or
hangs on a broken driver, the versions are known all the same. Arguments: the packages whose versions are asked for.
"""

import importlib
import importlib.metadata
import json
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

KERNELS = "sgl_kernel"  # SGLang's own, for GPUs
FEW_CHARACTERS = 400


def main() -> None:
    """Print one line per stage."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    seen: dict[str, Any] = {
        "python": sys.version.split()[0],
        "headers": headers.is_file(),
        "versions": {name: version_of(name) for name in sys.argv[1:]},
    }
    print(json.dumps(seen), flush=True)
    if seen["versions"].get("torch"):
        seen["torch"] = look_at_torch()
        print(json.dumps(seen), flush=True)
        if seen["versions"].get("sglang") and seen["torch"]["num_gpus"]:
            seen["kernels"] = problem_of_import(KERNELS)
            print(json.dumps(seen), flush=True)


def version_of(package: str) -> str:
    """Empty: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def look_at_torch() -> dict[str, Any]:
    """The CUDA that torch was built for (empty: none), the GPUs that it can use, and what it says of them.

    Only its `init` finds a GPU that this build has no code for, or one that another process holds for itself.
    """
    if reason := problem_of_import("torch"):
        return {"cuda": "", "num_gpus": 0, "problem": reason}
    torch: Any = importlib.import_module("torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        reason = problem_of(torch.cuda.init) if num_gpus else ""
    said = reason or " ".join(str(each.message) for each in caught)
    return {"cuda": torch.version.cuda or "", "num_gpus": 0 if reason else num_gpus, "problem": said[:FEW_CHARACTERS]}


def problem_of_import(module: str) -> str:
    """Empty if the module can be imported."""
    return problem_of(lambda: importlib.import_module(module))


def problem_of(call: Callable[[], object]) -> str:
    """Empty if it does not fail."""
    try:
        call()
    except Exception as error:  # of any library: the reason why it cannot be used
        return f"{type(error).__name__}: {error}"[:FEW_CHARACTERS]
    return ""


if __name__ == "__main__":
    main()
