"""Why a run ended before all of its steps, in words: for the log, the closing report, `penstock status` and the page.

Pure: of the fields of the ledger's `EarlyStopRecord`, as `stopped_early` of `summary.json` has them.
"""

from collections.abc import Mapping
from typing import Any

from penstock.contracts.vocabulary import MAIN_SET


def why_stopped_early(found: Mapping[str, Any]) -> str:
    """Such as `solved: in the last 80 tickets ...`, or `early: in 2 evaluations ...`."""
    if num_tickets := found.get("solved_tickets", 0):  # a summary of an earlier release has none
        return (
            f"solved: in the last {num_tickets} tickets no reward was below {found['best']:.4g}, the highest of the "
            f"run, which reaches eval.success ({found['success']:.4g}); no group had a gradient"
        )
    more = f" by more than {found['min_delta']:g}" if found["min_delta"] else ""
    of = "" if found["set"] == MAIN_SET else f" of {found['set']}"
    return (
        f"early: in {found['patience']} evaluations the {found['metric']}{of} did not exceed {found['best']:.4g} "
        f"(after {found['best_steps']} steps){more}: eval.patience"
    )
