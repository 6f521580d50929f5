"""A bundle: recorded steps in one tar file, from which another machine gets the same verdict.

Owns the file: its members, their order and their names. Invariant: it holds no pickle and no secret of the
configuration, and opening one writes only files of these names, in a folder of its own, whatever the file contains. An
opened bundle has the layout of a run's folder.

    README                 two lines for who gets it
    bundle.json            the run, its seed, the steps, versions, the model with its fingerprint
    config.yaml            the configuration as it was resolved, secrets masked
    steps/ledger.jsonl     the records of these steps: digests of step files and weights
    steps/settings-*.json  the configuration with which they were trained
    steps/*.pack           their groups
    start/                 the checkpoint to start from, as safetensors; absent for the initial weights
    model/, reference/, teacher/     the models of actor.path, ref.path and teacher.path, with --with-model
"""

import io
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from penstock.config.load import given_keys, load_config
from penstock.config.shown import as_yaml, masked
from penstock.contracts import Contract
from penstock.contracts.ledger import LedgerState
from penstock.durable import missing
from penstock.errors import ConfigError, DataError
from penstock.records.step_numbers import shown_steps
from penstock_trainer.checkpoints.folders import META, CheckpointMeta
from penstock_trainer.checkpoints.tensors import copy_state, read_all
from penstock_trainer.offline.environment import differing_versions, present_versions
from penstock_trainer.offline.model_reference import ModelReference, check_model, model_files, model_reference
from penstock_trainer.offline.recording import Plan, Recording, open_folder

MANIFEST, CONFIG, README, START, STATE = "bundle.json", "config.yaml", "README", "start", "state.safetensors"
MODEL, REFERENCE, TEACHER = "model", "reference", "teacher"
MEMBER = re.compile(
    r"README|bundle\.json|config\.yaml|steps(/(ledger\.jsonl|settings-[0-9a-f]{16}\.json|\d{8}\.\d+\.pack))?"
    r"|start(/(state\.safetensors|checkpoint\.json))?|(model|reference|teacher)(/[A-Za-z0-9][\w.-]*\.(json|safetensors))?"
)
# The Python version decides which of these tarfile can write.
COMPRESSIONS = {".tar": "", ".tar.gz": "gz", ".tgz": "gz", ".tar.xz": "xz", ".tar.zst": "zst"}
FILE_MODE = 0o644


class BundleManifest(Contract, frozen=True, tag_field="schema", tag="bundle/1"):
    """`bundle.json`. steps: ids, `first:end`; start: steps before them; reference, teacher: of ref.path
    and teacher.path, if they are other models.
    """

    run: str
    seed: int
    steps: str
    start: int
    versions: dict[str, str]
    model: ModelReference
    reference: ModelReference | None
    teacher: ModelReference | None = None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: the inputs of a replay, its steps as in --steps, notes on what may give other bits here."""

    recording: Recording
    steps: str
    notes: tuple[str, ...]


def write_bundle(recording: Recording, plan: Plan, out: Path, *, with_model: bool) -> None:
    """Write the steps of a plan to `out`, under a temporary name until it is complete."""
    mode = f"w:{_compression(out)}"
    if out.exists():
        raise ConfigError(f"--out {out} exists already: expected a file that does not; choose another one")
    config = recording.config

    def other(path: str, key: str) -> ModelReference | None:
        own = ("", config.actor.path)
        return None if path in own else model_reference(path, key, included=with_model)

    manifest = BundleManifest(
        run=config.run.name,
        seed=config.run.seed,
        steps=f"{plan.first}:{plan.end}",
        start=plan.start,
        versions=present_versions(),
        model=model_reference(config.actor.path, "actor.path", included=with_model),
        reference=other(config.ref.path if config.kl_ctl > 0 else "", "ref.path"),
        teacher=other(config.teacher.path, "teacher.path"),
    )
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        with tarfile.open(temporary, mode) as tar:  # type: ignore[call-overload]
            _fill(tar, recording, plan, manifest)
        temporary.replace(out)
    except SafetensorError as error:  # no room for the start, in the folder for temporary files
        raise ConfigError(f"--out {out} cannot be written ({error}): expected a folder with room") from error
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written ({error.strerror}): {missing(error, 'a folder with room')}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened_bundle(path: Path, settings: Sequence[str]) -> Iterator[Bundle]:
    """A bundle in a temporary folder; `settings` (--key value) override its configuration, the environment does not."""
    with tempfile.TemporaryDirectory(prefix="penstock-bundle-") as name:
        folder = Path(name)
        extract(path, folder)
        manifest = _manifest(path, folder)
        words = ["--config", str(folder / CONFIG)]
        if manifest.model.included:
            words += ["--actor.path", str(folder / MODEL)]
        if manifest.reference is not None and manifest.reference.included:
            words += ["--ref.path", str(folder / REFERENCE)]
        if manifest.teacher is not None and manifest.teacher.included:
            words += ["--teacher.path", str(folder / TEACHER)]
        words += _other_models(folder, words, settings)
        config = load_config([*words, *settings], environ={})
        check_model(config.actor.path, "actor.path", manifest.model)
        if manifest.reference is not None:
            check_model(config.ref.path, "ref.path", manifest.reference)
        if manifest.teacher is not None:
            check_model(config.teacher.path, "teacher.path", manifest.teacher)
        recording = open_folder(config, folder, overridden=given_keys([*words, *settings]))
        if manifest.start:
            recording = _with_start(recording)
        first, _, end = manifest.steps.partition(":")
        yield Bundle(recording, shown_steps(int(first), int(end)), tuple(differing_versions(manifest.versions)))


def _other_models(folder: Path, words: Sequence[str], settings: Sequence[str]) -> list[str]:
    """--key PATH of a reference or teacher that is the model of actor.path: it is, too, where that model is now."""
    recorded = load_config(["--config", str(folder / CONFIG)], environ={})
    now = load_config([*words, *settings], environ={}).actor.path
    paths = {"ref.path": recorded.ref.path, "teacher.path": recorded.teacher.path}
    return [word for key, path in paths.items() if path == recorded.actor.path for word in (f"--{key}", now)]


def extract(path: Path, folder: Path) -> None:
    """Unpack a bundle into an empty folder; DataError, and nothing written, if it holds other members."""
    try:
        with tarfile.open(path, "r:*") as tar:
            members = tar.getmembers()
            for member in members:
                if not (member.isfile() or member.isdir()) or not MEMBER.fullmatch(member.name):
                    raise DataError(
                        f"--bundle {path} holds {member.name!r}: expected only files that `penstock bundle` writes, "
                        "and nothing was unpacked"
                    )
            tar.extractall(folder, members, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"--bundle {path} cannot be read ({reason}): expected what `penstock bundle` wrote") from error


def _fill(tar: tarfile.TarFile, recording: Recording, plan: Plan, manifest: BundleManifest) -> None:
    _add(tar, README, _readme(manifest).encode())
    _add(tar, MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2))
    document = as_yaml(masked(recording.config))
    _add(tar, CONFIG, document.encode())
    journal = recording.step_files.journal
    _add(tar, f"steps/{journal.path.name}", journal.lines(_excerpt(recording.ledger, plan)))
    records = [recording.steps[step] for step in range(plan.start, plan.end)]
    for digest in sorted({record.settings for record in records if record.settings}):
        path = recording.step_files.settings.path(digest)
        _add_file(tar, f"steps/{path.name}", path)
    for record in records:
        name = record.file
        _add_file(tar, f"steps/{name}", journal.path.with_name(name))
    if plan.checkpoint is not None:
        meta, folder = recording.checkpoints.read(plan.checkpoint)
        _add(tar, f"{START}/{META}", msgspec.json.encode(msgspec.structs.replace(meta, files={})))
        with tempfile.TemporaryDirectory(prefix="penstock-bundle-") as name:
            save_file(read_all(folder), Path(name) / STATE)
            _add_file(tar, f"{START}/{STATE}", Path(name) / STATE)
    for reference, name in ((manifest.model, MODEL), (manifest.reference, REFERENCE), (manifest.teacher, TEACHER)):
        if reference is not None and reference.included:
            for file in model_files(reference.path):
                _add_file(tar, f"{name}/{file.name}", file)


def _excerpt(ledger: LedgerState, plan: Plan) -> LedgerState:
    """The ledger's records of the steps of a plan and of the weights around them."""
    return LedgerState(
        run=ledger.run,
        steps=[record for record in ledger.steps if plan.start <= record.step < plan.end],
        weights={steps: record for steps, record in ledger.weights.items() if plan.start <= steps <= plan.end},
    )


def _readme(manifest: BundleManifest) -> str:
    needed = f"penstock {manifest.versions['penstock']}, torch {manifest.versions['torch']}"
    if not manifest.model.included:
        needed += f", and the model {manifest.model.path} (elsewhere: --actor.path FOLDER)"
    return (
        f"Steps {manifest.steps} (ids from 0, without the last) of Penstock run {manifest.run}: inputs, configuration, "
        "digests, starting weights.\n"
        f"Train them again and compare: penstock replay --bundle FILE (needs {needed}).\n"
    )


def _with_start(recording: Recording) -> Recording:
    """The start as a checkpoint of this folder."""
    folder = recording.folder / START
    try:
        meta = msgspec.json.decode((folder / META).read_bytes(), type=CheckpointMeta)
        state = load_file(folder / STATE)
    except (OSError, msgspec.DecodeError, SafetensorError) as error:
        raise DataError(f"the bundle's {START}/ cannot be read ({error}): expected a checkpoint") from error
    temporary = recording.checkpoints.begin(meta)
    copy_state(state, None, None).write(temporary)
    record = recording.checkpoints.complete(temporary, meta)
    return replace(recording, ledger=replace(recording.ledger, checkpoints=[record]))


def _manifest(path: Path, folder: Path) -> BundleManifest:
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=BundleManifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"--bundle {path}: its {MANIFEST} cannot be read ({error}); expected schema bundle/1"
        ) from error


def _compression(out: Path) -> str:
    suffix = next((each for each in sorted(COMPRESSIONS, key=len, reverse=True) if out.name.endswith(each)), None)
    possible = [each for each, kind in COMPRESSIONS.items() if (kind or "tar") in tarfile.TarFile.OPEN_METH]
    if suffix not in possible:
        raise ConfigError(f"--out {out}: expected a name that ends in one of {', '.join(possible)}")
    return COMPRESSIONS[suffix or ""]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), FILE_MODE
    tar.addfile(info, io.BytesIO(data))


def _add_file(tar: tarfile.TarFile, name: str, path: Path) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = path.stat().st_size, FILE_MODE
    with path.open("rb") as file:
        tar.addfile(info, file)
