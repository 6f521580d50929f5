"""Where the bytes of a pushed version are, as the trainer tells a rollout server in `PUT /v1/weights/{version}`.

Owns these messages, one per transport; the tag `transport` tells them apart. Invariant: a source names no code and
nothing pickled. Written by the trainer's transports, read by the rollout service's loaders.
"""

from typing import Any

import msgspec

from penstock.contracts import Contract
from penstock.errors import WeightsError


class DiskSource(Contract, frozen=True, tag_field="transport", tag="disk"):
    """Files in the folder that the push names, with their manifest."""


Source = DiskSource


def read_source(body: dict[str, Any]) -> Source:
    """The source in a push's body; WeightsError when this release knows none like it."""
    try:
        return msgspec.convert(body, type=Source)
    except msgspec.ValidationError as error:
        raise WeightsError(
            f"the source of a push is {str(body)[:200]} ({error}): expected one that this release knows; trainer and "
            "rollout services must be of one release"
        ) from error
