"""What the loop drives, and what it is asked for.

Owns the names of the parts. Made by `wiring`, used by the loop; HTTP and signals write into `Requests`.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.ledger import RunRecord
from penstock.tickets import TicketBook
from penstock_trainer.canary import CanaryMaker
from penstock_trainer.checkpoint import Checkpoints
from penstock_trainer.checkpoint_writer import CheckpointWriter
from penstock_trainer.consumer import Consumer
from penstock_trainer.draws import Draws
from penstock_trainer.evaluation import Evaluation
from penstock_trainer.learner import Learner
from penstock_trainer.metrics import TrainerMetrics
from penstock_trainer.releases import Releases
from penstock_trainer.reports import Reports
from penstock_trainer.status import Status
from penstock_trainer.step_files import StepFiles
from penstock_trainer.transport import Transport
from penstock_trainer.watchdog import Watchdog


@dataclass
class Requests:
    """What HTTP and signals ask of the loop."""

    stop: asyncio.Event
    checkpoint: bool = False


@dataclass(frozen=True)
class Parts:
    """Everything that the loop drives, made by `wiring`."""

    config: Config
    trainer_queue: TrainerQueue
    book: TicketBook
    draws: Draws
    consumer: Consumer
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
