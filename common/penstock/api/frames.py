"""The records of a run as pandas DataFrames: a row a line, a column a value.

Invariant: pandas is imported here alone, when a frame is made. Columns have the names that curves have in trackers:
`reward_mean`, `statistics/loss`, `seconds/step`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from penstock.errors import PenstockError

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(lines: Iterable[Mapping[str, Any]]) -> "DataFrame":
    """The lines in their order; what a line lacks is missing in its row."""
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise PenstockError(
            f"pandas is not installed ({error}); expected `pip install pandas`, which tables of a run need"
        ) from None
    return DataFrame.from_records([dict(_flat(line)) for line in lines])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
