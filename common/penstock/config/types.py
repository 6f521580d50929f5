"""Base class and field types of all sections of the configuration."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from penstock.config.secrets import check_http_url, url_secrets

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _as_names(value: object) -> object:
    """`0`, `0,1` and `[0, 1]` are lists too, and nothing an empty one; a number is a name."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    each = value if isinstance(value, list | tuple) else [value]
    return tuple(str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in each)


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("expected each of them once")
    return names


def _is_of_a_server(url: str) -> str:
    check_http_url(url)
    if any(url_secrets(url)):
        raise ValueError("it holds a password, which is no secret there: expected http://host:port")
    return url.rstrip("/")


def _is_gpu_name(name: str) -> str:
    if not re.fullmatch(r"[0-9]+|GPU-[0-9A-Za-z-]+|MIG-[0-9A-Za-z/-]+", name):
        raise ValueError("expected a number as nvidia-smi shows it, or a UUID (GPU-..., MIG-...)")
    return name


GpuName = Annotated[str, AfterValidator(_is_gpu_name)]
Gpus = Annotated[
    tuple[GpuName, ...],
    BeforeValidator(_as_names, json_schema_input_type=list[str | int] | str | int | None),
    AfterValidator(_each_once),
]

Urls = Annotated[
    tuple[Annotated[str, AfterValidator(_is_of_a_server)], ...],
    BeforeValidator(_as_names, json_schema_input_type=list[str] | str | None),
    AfterValidator(_each_once),
]
"""Addresses of servers."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, numbers are finite, values do not change after start."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
