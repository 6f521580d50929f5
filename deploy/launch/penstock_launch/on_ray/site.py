"""The site of a run on a Ray cluster: the actor of each service, and the resources that it reserves.

The queue runs on the node of this process, but in an actor: `ray job stop` signals every descendant of the driver, and
the trainer still needs the queue then.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from penstock.broker.embedded import EmbeddedServer, find_server
from penstock.config import Config, RedisSection
from penstock.config.ray import RayAgentSection, RayRewardSection, RayRolloutSection, RayTrainerSection
from penstock.config.shown import secret_settings
from penstock.contracts import ServiceKind
from penstock.runtime.address import Listening
from penstock_launch.launch import StartedQueue
from penstock_launch.on_ray.cluster import Cluster, reserving, within
from penstock_launch.on_ray.host import Order, digest
from penstock_launch.on_ray.remote import Member, RemoteService
from penstock_launch.run_folder import RunFolder
from penstock_launch.services import commands
from penstock_launch.supervise.child import Child, Command
from penstock_launch.supervise.restarts import RestartPolicy
from penstock_launch.supervise.supervisor import QUEUE, TRAINER

HINT = "loads what an earlier run left"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
AUTO_HOSTS = ("", "auto")


class RaySite:
    """The nodes of a Ray cluster."""

    sees_all = False

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def start_queue(
        self, redis: RedisSection, folder: RunFolder, policy: RestartPolicy, on_end: Callable[[], None]
    ) -> StartedQueue:
        find_server()  # checked now: the actor is on this node, and its error would come late
        host = self._cluster.host
        server = EmbeddedServer(folder.queue, log_path=folder.logs / "queue.log", listen=host, host=host)
        order = Order((), {}, server.log_path, os.getcwd(), folder.config_path, "", server)
        member = Member(self._cluster.here(), f"node {host}", order)
        child = Child(RemoteService(QUEUE, server.log_path, HINT, (member,), redis.timeout_seconds), policy)
        child.start(on_end)
        return StartedQueue(child, server.section(redis), "an embedded server", child.kill_session)

    def place(self) -> Sequence[str]:
        """Nothing: Ray gives each actor what it reserves."""
        return ()

    def services(
        self, config: Config, folder: RunFolder, redis: RedisSection, environ: Mapping[str, str]
    ) -> list[RemoteService]:
        one_rank = config.model_copy(update={"trainer": config.trainer.model_copy(update={"num_ranks": 1})})
        secrets = secret_settings(config, redis)
        config_digest = digest(folder.config_path)

        def order(command: Command) -> Order:
            arguments = command.arguments[1:]
            return Order(arguments, secrets, command.log_path, os.getcwd(), folder.config_path, config_digest)

        started = commands(one_rank, folder, redis, environ)
        kinds = {kind: [each for each in started if kind_of(each.name) is kind] for kind in ServiceKind}
        [trainer] = kinds[ServiceKind.TRAINER]
        return [
            *self._rollouts(config, kinds[ServiceKind.ROLLOUT], order),
            self._trainer(config, trainer, order),
            *_anywhere(config, kinds[ServiceKind.AGENT], config.ray.agent, config.agent, order),
            *_anywhere(config, kinds[ServiceKind.REWARD], config.ray.reward, config.reward, order),
        ]

    def _rollouts(
        self, config: Config, started: Sequence[Command], order: Callable[[Command], Order]
    ) -> list[RemoteService]:
        section, engine = config.ray.rollout, config.rollout.engine
        bundle = self._bundle(section, engine.num_gpus if engine.takes_gpus else 0)
        group = self._cluster.group([bundle] * len(started), section.strategy)
        needs = f"{_shown(bundle)} ({len(started)} such bundles, {section.strategy})"
        listening = overrides(ServiceKind.ROLLOUT, config.rollout)
        return [
            _service(config, each, [Member(within(group, index, bundle), needs, order(each), listening)])
            for index, each in enumerate(started)
        ]

    def _trainer(self, config: Config, started: Command, order: Callable[[Command], Order]) -> RemoteService:
        section, num_ranks = config.ray.trainer, config.trainer.num_ranks
        bundle = self._bundle(section, 0 if config.trainer.device == "cpu" else 1)
        group = self._cluster.group([bundle] * num_ranks, section.strategy)
        needs = f"{_shown(bundle)} ({num_ranks} such bundles, {section.strategy})"
        own = order(started)
        members = [
            Member(
                within(group, rank, bundle),
                needs,
                # One log for each: two hosts that append to one file of a network file system spoil it.
                own if rank == 0 else replace(own, log_path=own.log_path.with_name(f"trainer-rank-{rank}.log")),
                overrides(ServiceKind.TRAINER, config.trainer),
            )
            for rank in range(num_ranks)
        ]
        return _service(config, started, members)

    def _bundle(self, section: RayRolloutSection | RayTrainerSection, num_gpus: int) -> dict[str, float]:
        """`num_gpus`: that the process uses if it has some."""
        given = num_gpus * self._cluster.has_gpus if section.num_gpus is None or not num_gpus else section.num_gpus
        return {"CPU": section.num_cpus, **({"GPU": given} if given else {}), **section.resources}


def kind_of(name: str) -> ServiceKind:
    """rollout, of rollout-3."""
    return ServiceKind(name.partition("-")[0])


def overrides(kind: ServiceKind, section: Listening) -> Callable[[str], tuple[str, ...]]:
    """The overrides of a service on a node: it listens on the node's address and registers it."""

    def on_node(host: str) -> tuple[str, ...]:
        listen = (f"--{kind}.host", host) if section.host in LOOPBACK else ()
        reached = (f"--{kind}.advertise_host", host) if section.advertise_host in AUTO_HOSTS else ()
        return (*listen, *reached)

    return on_node


def _anywhere(
    config: Config,
    started: Sequence[Command],
    section: RayAgentSection | RayRewardSection,
    listening: Listening,
    order: Callable[[Command], Order],
) -> list[RemoteService]:
    """Services of one kind without GPUs, each on whatever node has room."""
    bundle = {"CPU": section.num_cpus, **section.resources}
    options = {**reserving(bundle), "scheduling_strategy": "SPREAD"}
    return [
        _service(config, each, [Member(options, _shown(bundle), order(each), overrides(kind_of(each.name), listening))])
        for each in started
    ]


def _service(config: Config, command: Command, members: Sequence[Member]) -> RemoteService:
    return RemoteService(
        command.name,
        command.log_path,
        command.hint,
        members,
        config.ray.place_seconds,
        # The others continue without a server or a reward service, and the trainer detects a stall; not without it.
        may_wait_later=command.name != TRAINER,
    )


def _shown(bundle: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
