"""What the loop drives, and what it is asked for.

Owns the names of the parts. Made by `wiring`, used by the loop; HTTP and signals write into `Requests`.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts.ledger import RunRecord
from penstock.tickets import TicketBook
from penstock_trainer.checkpoints.folders import Checkpoints
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.checkpoints.writer import CheckpointWriter
from penstock_trainer.learner.learner import Learner
from penstock_trainer.releases import Releases
from penstock_trainer.reports import Reports
from penstock_trainer.rollouts.consumer import Consumer
from penstock_trainer.rollouts.evaluation import Evaluation
from penstock_trainer.rollouts.issuing import Issuer
from penstock_trainer.rollouts.versions import Versions
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.status import Status
from penstock_trainer.watchdog import Watchdog
from penstock_trainer.weight_sync.canary import CanaryMaker
from penstock_trainer.weight_sync.transport import Transport


@dataclass(frozen=True)
class Parts:
    """Everything that the loop drives, made by `wiring`."""

    config: Config
    trainer_queue: TrainerQueue
    book: TicketBook
    issuer: Issuer
    versions: Versions
    consumer: Consumer
    changed: asyncio.Event
    evaluation: Evaluation
    releases: Releases
    learner: Learner
    transport: Transport
    canary: CanaryMaker
    step_files: StepFiles
    checkpoints: Checkpoints
    checkpoint_writer: CheckpointWriter
    reports: Reports
    status: Status
    watchdog: Watchdog
    metrics: TrainerMetrics
    run_record: RunRecord
    final_folder: Path
