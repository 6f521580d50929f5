"""`python -m penstock_reward --config F [--key value ...]`: the reward service.

Wires queue, worker processes, scorer, loop and HTTP, and registers the service. Stateless: if it dies, another service
takes the groups that it held. Exit codes: `penstock.errors`.
"""

import os
import socket
from typing import NoReturn

from penstock.broker import Worker, connect
from penstock.config import Config
from penstock.contracts import ServiceKind
from penstock.contracts.services import ServiceRecord
from penstock.runtime import service
from penstock.runtime.address import advertised_host
from penstock_reward.app import make_reward_app
from penstock_reward.metrics import RewardMetrics
from penstock_reward.processes.pool import open_pool
from penstock_reward.score_groups import score_groups
from penstock_reward.scoring.permits import Permits
from penstock_reward.scoring.scoring import Scoring

READY = "ready"
GROUPS_PER_WORKER = 2  # one is scored while the next is decoded or handed over


async def start(config: Config) -> None:
    """Run until stopped."""
    section, scored = config.reward, config.all_rewards
    served = service.Service(section.host, section.port, "reward.port")
    queue = await connect(config, ServiceKind.REWARD)
    try:
        served.advertise(await advertised_host(ServiceKind.REWARD, section, config.redis.url))
        async with open_pool(scored) as pool:
            metrics = RewardMetrics()
            metrics.watch_workers(lambda: pool.num_ready)
            scoring = Scoring(scored, pool, metrics, own=config.own_functions)
            worker = Worker(queue, f"reward-{socket.gethostname()}-{os.getpid()}", config.staleness)
            # Every outstanding ticket may be parked, so that parked groups never keep others in the stream.
            permits = Permits(section.num_workers * GROUPS_PER_WORKER, max_parked=config.max_outstanding)
            metrics.watch_parked(lambda: permits.num_parked)

            def record() -> ServiceRecord:
                waiting_for = scoring.breakers.describe()
                state = f"breaker open: {waiting_for}" if waiting_for else pool.in_flight.describe() or READY
                open_breakers = scoring.breakers.open_ones()
                return ServiceRecord(
                    ServiceKind.REWARD, worker.name, served.url, os.getpid(), state, open_breakers=open_breakers
                )

            await served.run(
                make_reward_app(scored, scoring, pool, metrics.registry, config.token),
                background=[worker.keep_alive(), queue.keep_registered(record, config.staleness.heartbeat_seconds)],
                score_groups=score_groups(worker, scoring, metrics, served.stop, permits),
            )
            await worker.retire()
            await queue.unregister(worker.name)
    finally:
        await queue.close()


def main() -> NoReturn:
    """Entry point."""
    service.main(ServiceKind.REWARD, start)


if __name__ == "__main__":
    main()
