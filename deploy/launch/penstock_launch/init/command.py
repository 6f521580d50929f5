"""`penstock init`: writes a configuration, a reward function and a few prompts to begin a task of one's own with.

Owns what is written. Invariant: no file is overwritten, and after an error none of its own is left.
"""

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template

from penstock.config import EngineSection
from penstock.errors import ConfigError
from penstock_launch.commands.show_config import schema
from penstock_launch.gpus.nvidia import LOOK_SECONDS, has_gpu, read_driver

TEMPLATES = Path(__file__).parent / "templates"
CONFIG, SCHEMA, TRAIN, HELDOUT = "config.yaml", "config.schema.json", "train.jsonl", "heldout.jsonl"
SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # trains on two CPU cores, and is learning within minutes
HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?"  # owner/name


def init(folder: Path, environ: Mapping[str, str], *, model: str, agent: bool) -> list[str]:
    """Write the files; returns the lines to print. ConfigError if one is there, or the folder cannot be written."""
    python, on_gpu = find_sglang(folder), has_gpu(read_driver(environ, LOOK_SECONDS), environ)
    files = contents(folder, agent=agent, model=model, python=python, on_gpu=on_gpu)
    write_new(folder, files)
    code = "environment.py" if agent else "rewards.py"
    lines = [f"{folder}: {', '.join(files)} written", "", "Next:"]
    if folder.resolve() != Path.cwd():
        lines.append(f"  cd {shlex.quote(str(folder))}")
    lines += [
        f"  penstock check --config {CONFIG}          # tries paths, rewards and prompts, and looks for room",
        f"  penstock launch local --config {CONFIG}   # trains; Ctrl-C ends it, and the same command resumes it",
        "",
        f"Then make it yours: {TRAIN} and {HELDOUT} (prompts), {code} (what an answer is worth), {CONFIG}.",
    ]
    if python is None:
        lines.append("No environment of SGLang was found: `penstock envs` makes one, for rollout.engine.python.")
    return lines


def find_sglang(folder: Path) -> Path | None:
    """The interpreter of SGLang's environment in the folder, in this one, or beside that of the services."""
    name = EngineSection().python
    places = (folder.absolute(), Path.cwd(), Path(sys.prefix).parent)
    return next((place / name for place in places if (place / name).exists()), None)


def contents(folder: Path, *, agent: bool, model: str, python: Path | None, on_gpu: bool) -> dict[str, str]:
    """The text of each file, by its name."""
    code, task = ("environment.py", "agent.yaml") if agent else ("rewards.py", "reward.yaml")
    return {
        CONFIG: Template(_read(CONFIG)).substitute(
            name=_quoted(run_name(folder)),
            run_folder=f"runs/{run_name(folder)}",
            model=_quoted(_from_here(model)),
            dtype="bfloat16" if on_gpu else "float32",
            why_dtype="of GPUs" if on_gpu else "most CPUs compute bfloat16 several times more slowly; GPUs: bfloat16",
            task=_read(task),
            python=f"python: {_quoted(str(python))} # of SGLang's environment"
            if python
            else "# python: path/to/bin/python # of SGLang's environment",
            sizes="# max_running_requests: 256 # completions at once" if on_gpu else _CPU_SIZES,
        ),
        code: _read(code),
        TRAIN: _read(TRAIN),
        HELDOUT: _read(HELDOUT),
        SCHEMA: schema(),
    }


_CPU_SIZES = """context_length: 1024 # tokens of the longest prompt and its answer
    max_total_tokens: 16384 # of its cache, which is in the host's memory"""


def run_name(folder: Path) -> str:
    """A name of a run like that of the folder."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).lstrip("_.-")[:63] or "my-run"


def write_new(folder: Path, files: Mapping[str, str]) -> None:
    """Write files that are not there yet, all or none; ConfigError otherwise."""
    if there := [name for name in files if (folder / name).exists()]:
        raise ConfigError(f"{folder} has {', '.join(there)} already: expected a folder without; name another FOLDER")
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with (folder / name).open("x", encoding="utf-8") as file:
                written.append(folder / name)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); expected a folder of this user's") from None


def _from_here(model: str) -> str:
    """A folder by its full path, because the run begins in another one; anything else is a hub name."""
    path = Path(model).expanduser()
    if model and path.is_dir():
        return str(path.absolute())
    if not re.fullmatch(HUB_NAME, model):
        raise ConfigError(f"--model {model}: no such folder; expected a folder with a model, or a name on the hub")
    return model


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _quoted(text: str) -> str:
    """A text in YAML, whatever it holds."""
    return json.dumps(text, ensure_ascii=False)
