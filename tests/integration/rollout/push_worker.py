"""One of two ranks, started by torchrun for test_transports_sglang: `push_worker.py MODEL FOLDER URL LEASE`.

Trains a step on both ranks and broadcasts the weights before and after it to the rollout service at URL; leaves the
trained ones in FOLDER/trained.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import cast

from penstock.broker import Queue
from penstock.config import Config
from penstock.contracts import ScoredGroup, ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord
from penstock_trainer.distributed.rank import RankInfo
from penstock_trainer.distributed.ranks import Ranks
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.rank_commands import Follower, LeadingLearner
from penstock_trainer.weight_sync.choose import make_transport
from penstock_trainer.weight_sync.publisher import Publisher
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from tests.patience import ANSWER_SECONDS
from tests.unit.trainer.trainer_groups import completion, config_for, scored_group


class Registry:
    """The part of the queue that a publisher reads."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def services(self) -> list[ServiceRecord]:
        return [ServiceRecord(ServiceKind.ROLLOUT, "r", self._url, 0, "serving")]


def batch() -> list[ScoredGroup]:
    """Two groups, one for each rank."""
    answers = [completion([7, 8], [-3.0, -3.5]), completion([8], [-2.0])]
    return [scored_group(number, [4, 5 + number], answers, [1.0, 0.0]) for number in range(2)]


async def push_twice(config: Config, learner: Learner, folder: Path, url: str, lease: int) -> None:
    client = RolloutClient(config)
    transport = make_transport(config, learner, folder, client, "http://127.0.0.1:0")
    publisher = Publisher(cast(Queue, Registry(url)), client, transport, config.weights.push_timeout_seconds)
    for version in (1, 2):
        identity = await asyncio.to_thread(transport.stage, version, lease)
        announcement = Announcement(identity, str(transport.folder_of(version, lease)), lease)
        pushing = asyncio.create_task(publisher.push(announcement))
        if version == 1:  # during the push, as in the loop
            await asyncio.to_thread(learner.update, batch(), version=1)
        push = await pushing
        assert push.live == ("r",), push.fenced
    transport.close()
    await client.close()


def run(model: Path, folder: Path, url: str, lease: int) -> None:
    config = config_for(
        model,
        weights={"transport": "nccl", "bucket_bytes": 65536, "push_timeout_seconds": ANSWER_SECONDS},
        optimizer={"lr": 1e-2},
        rollout={"engine": {"dtype": "float32"}},
    )
    info = RankInfo.of(os.environ)
    ranks = Ranks(info)
    if info.is_follower:
        Follower(Learner(config, ranks), ranks).run()
    else:
        learner = LeadingLearner(config, ranks)
        asyncio.run(push_twice(config, learner, folder / "ranks", url, lease))
        learner.save_pretrained(folder / "trained", 1)
        learner.close()
    ranks.leave()


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
