"""`python -m penstock_trainer --config F [--key value ...]`: the trainer service. Exit codes: `penstock.errors`.

Under torchrun rank 0 is the service and the other ranks follow it; no rank outlives torchrun.
"""

import os

from penstock.config import Config
from penstock.model_path import check_model_path
from penstock.runtime.lifeline import die_with_parent
from penstock.runtime.service import Service, main
from penstock_trainer.data.datasets import BegunRows, source_states, training_rows
from penstock_trainer.data.held_out import load_held_out
from penstock_trainer.data.rows import with_rewards
from penstock_trainer.distributed.rank import RankInfo, service_name
from penstock_trainer.telemetry.trackers import require_trackers


async def start(config: Config) -> None:
    """Run this rank of the trainer until its run has ended or it is stopped."""
    info = RankInfo.of(os.environ)
    if info.num_ranks > 1:
        die_with_parent(os.getppid())
    if info.is_follower:
        from penstock_trainer.learner.rank_commands import follow

        follow(config, info)
        return
    service = Service(config.trainer.host, config.trainer.port, "trainer.port")
    check_model_path(config.actor.path, "actor.path")
    require_trackers(config.tracking)
    train = _begun(config)
    held_out = load_held_out(config)
    # Importing torch takes seconds: errors that can be found without it have been reported before.
    from penstock_trainer.wiring import run_trainer

    await run_trainer(config, service, info, train, held_out)


def _begun(config: Config) -> BegunRows:
    states = source_states(config)  # before the first row is read
    rows = training_rows(config.data, of_episodes=config.agent.enabled)
    return BegunRows(with_rewards(rows, config.all_rewards.functions), states)


if __name__ == "__main__":
    main(service_name(os.environ), start)
