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
from penstock_reward.teacher.teacher import Teacher, make_teacher

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
            teacher = make_teacher(config.teacher, metrics)
            worker = Worker(queue, f"reward-{socket.gethostname()}-{os.getpid()}", config.staleness)
            # Every outstanding ticket may be parked, so that parked groups never keep others in the stream.
            permits = Permits(section.num_workers * GROUPS_PER_WORKER, max_parked=config.max_outstanding)
            metrics.watch_parked(lambda: permits.num_parked)

            def record() -> ServiceRecord:
                open_breakers = {**scoring.breakers.open_ones(), **down_servers(teacher)}
                waiting_for = "; ".join(f"{name} ({why})" for name, why in open_breakers.items())
                state = f"breaker open: {waiting_for}" if waiting_for else pool.in_flight.describe() or READY
                return ServiceRecord(
                    ServiceKind.REWARD, worker.name, served.url, os.getpid(), state, open_breakers=open_breakers
                )

            def not_ready() -> str | None:
                return pool.not_ready() or (None if teacher is None else teacher.servers.not_ready)

            try:
                await served.run(
                    make_reward_app(scored, scoring, pool, metrics.registry, config.token, not_ready),
                    background=[
                        worker.keep_alive(record),
                        *([] if teacher is None else [teacher.servers.keep_probing()]),
                    ],
                    score_groups=score_groups(worker, scoring, metrics, served.stop, permits, teacher),
                )
            finally:
                if teacher is not None:
                    await teacher.servers.close()
            await worker.retire()
            await queue.unregister(worker.name)
    finally:
        await queue.close()


def down_servers(teacher: Teacher | None) -> dict[str, str]:
    """The teacher's servers that are down, as open breakers: groups that need them wait."""
    return {} if teacher is None else {f"teacher {url}": why for url, why in teacher.servers.down.items()}


def main() -> NoReturn:
    """Entry point."""
    service.main(ServiceKind.REWARD, start)


if __name__ == "__main__":
    main()
