"""The Ray cluster that a launch uses: connection, own node, placement groups.

Invariant: everything that it creates ends with `close`, or else with this process's job in Ray.
"""

import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from penstock.config import RaySection
from penstock.errors import ConfigError

CONNECT_SECONDS = 10.0
AUTO = "auto"


class Cluster:
    """The cluster, seen from a driver on one of its nodes."""

    def __init__(self, section: RaySection) -> None:
        """ConfigError naming ray.address or ray.runtime_env if there is none, or this host is not a node of it."""
        _require_answer(section.address)
        try:
            ray.init(
                address=section.address,
                runtime_env=dict(section.runtime_env) or None,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            reason = " ".join(str(error).split())[:400]
            raise ConfigError(
                f"ray.address: {section.address!r}: {reason}; expected a Ray cluster that this host is a node of, such "
                "as one made by `ray start --head`, and a ray.runtime_env that it accepts"
            ) from None
        self.node_id: str = ray.get_runtime_context().get_node_id()
        self.host: str = ray.util.get_node_ip_address()
        self.has_gpus = ray.cluster_resources().get("GPU", 0) > 0

    def group(self, bundles: Sequence[Mapping[str, float]], strategy: str) -> PlacementGroup:
        """Reserve resources together. Returns at once."""
        return placement_group([dict(bundle) for bundle in bundles], strategy=strategy)

    def here(self) -> dict[str, Any]:
        """Options of an actor that runs on this node and reserves nothing."""
        strategy = NodeAffinitySchedulingStrategy(node_id=self.node_id, soft=False)
        return {"num_cpus": 0, "scheduling_strategy": strategy}

    def close(self) -> None:
        """End all actors and placement groups of this launch."""
        ray.shutdown()


def within(group: PlacementGroup, index: int, bundle: Mapping[str, float]) -> dict[str, Any]:
    """Options of an actor that takes a whole bundle of a placement group."""
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {**reserving(bundle), "scheduling_strategy": strategy}


def reserving(bundle: Mapping[str, float]) -> dict[str, Any]:
    """Options of an actor that reserves resources."""
    further = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "resources": further or None}


def _require_answer(address: str) -> None:
    """Check the port first: without a server, ray.init itself would wait for many minutes."""
    if address == AUTO:
        return
    host, separator, port = address.rpartition(":")
    if not separator or "/" in host or not port.isdigit():
        raise ConfigError(
            f"ray.address: saw {address!r}; expected auto or host:port of the head, and a launch on a node of that "
            "cluster (`ray job submit` does that), not through Ray Client"
        )
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"ray.address: nothing answers at {address} ({error}); expected the head of a Ray cluster, as "
            "`ray start --head` shows it"
        ) from None
