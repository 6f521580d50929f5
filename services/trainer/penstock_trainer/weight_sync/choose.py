"""The transport of the configuration. Owns the choice of `auto` and the folder of versions as files."""

import logging
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import torch

from penstock.config import Config
from penstock.weights.local_folder import LocalFolder, name_of_run
from penstock_trainer.weight_sync.broadcast import BroadcastTransport
from penstock_trainer.weight_sync.disk import DiskTransport
from penstock_trainer.weight_sync.process_group import MeetingPoint
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weight_sync.shared_memory import SharedMemoryTransport
from penstock_trainer.weight_sync.transport import Transport
from penstock_trainer.weights.deltas import DeltaWriter
from penstock_trainer.weights.files import Format, published_format
from penstock_trainer.weights.staging import Staging, WeightsSource, default_folder

log = logging.getLogger(__name__)

KEPT_VERSIONS = 3  # the announced one, the one being pushed, the one being written


class PlacedSource(WeightsSource, Protocol):
    """The learner."""

    @property
    def device(self) -> str: ...


def make_transport(
    config: Config, source: PlacedSource, run_folder: Path, client: RolloutClient, url: str
) -> Transport:
    """`url`: of the trainer's own service; engines can reach its host."""
    section = config.weights
    form = published_format(config)
    folder = _folder(config, source, form, run_folder)
    takes_turns = config.trainer.take_turns  # then files are all that can reach an engine without GPU memory
    transport = "disk" if takes_turns else chosen(section.transport, source.device, config.trainer.host)
    if transport == "disk":
        deltas = _deltas(config, form, run_folder) if section.full_every else None
        return DiskTransport(Staging(source, folder, form, keep=KEPT_VERSIONS, deltas=deltas))
    if transport == "tensor":
        return SharedMemoryTransport(source, folder, form, bucket_bytes=section.bucket_bytes, keep=KEPT_VERSIONS)
    return BroadcastTransport(
        source,
        folder,
        form,
        bucket_bytes=section.bucket_bytes,
        keep=KEPT_VERSIONS,
        client=client,
        point=MeetingPoint(urlsplit(url).hostname or config.trainer.host, section.rendezvous_port),
        device=torch.device(source.device),
        seconds=section.push_timeout_seconds,
    )


def chosen(transport: str, device: str, host: str) -> str:
    """Resolve `auto`. On one host files in memory are as fast and stay readable, and nccl refuses a shared GPU."""
    if transport != "auto":
        return transport
    is_alone = host == "localhost" or host.startswith("127.") or host == "::1"
    resolved = "nccl" if device == "cuda" and not is_alone else "disk"
    log.info("weights.transport auto is %s: the trainer is on %s, and trainer.host is %s", resolved, device, host)
    return resolved


def _deltas(config: Config, form: Format, run_folder: Path) -> DeltaWriter:
    name = f"{name_of_run(config.run.name, run_folder)}-trainer"
    section = config.weights
    return DeltaWriter(lambda num_bytes: LocalFolder(name, num_bytes, section.local_folder), form, section.full_every)


def _folder(config: Config, source: WeightsSource, form: Format, run_folder: Path) -> Path:
    if config.weights.folder:
        return Path(config.weights.folder) / config.run.name
    needed_bytes = KEPT_VERSIONS * sum(map(form.num_bytes, source.weights().shapes.values()))
    return default_folder(config.run.name, run_folder, needed_bytes)
