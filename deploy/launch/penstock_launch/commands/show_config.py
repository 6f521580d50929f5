"""`penstock config`: the configuration that a run would use, in full or what differs from the defaults; its schema."""

import json
from collections.abc import Mapping

from penstock.config import Config
from penstock.config.shown import as_yaml, changed, hidden_keys, masked
from penstock_launch.gpus.shares import shown_placement


def resolved(config: Config, environ: Mapping[str, str]) -> str:
    """All keys, secrets masked, and which GPUs of this host the processes would get."""
    placement = "".join(f"# {line}\n" for line in shown_placement(config, environ))
    return f"{as_yaml(masked(config))}{placement}"


def non_defaults(config: Config) -> str:
    """What differs from the defaults, as a file that means the same; secrets are left out, and named."""
    hidden = hidden_keys(config)
    note = f"# Secrets are left out; set them again: {', '.join(hidden)}.\n" if hidden else ""
    return f"{note}{as_yaml(changed(config))}"


def schema() -> str:
    """The JSON schema of a configuration file, for editors."""
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(document, indent=2) + "\n"
