"""The events that the curves mark: checkpoints, steps that were not finite, restarts and pushes.

Owns their queries. The value of most is the moment of the event, in milliseconds, so that the mark is exact however far
the curves are zoomed out; Grafana joins those that are closer than a hundredth of the time range. The mark of a counter
is as exact as the scrapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.models import dashboard

from deploy.grafana.source import RUN, SOURCE

LAST = "penstock_trainer_last_event_timestamp_seconds"


@dataclass(frozen=True)
class Event:
    """A kind of event. text: of one of them, with labels in braces. is_moment: the query's value is when it was."""

    name: str
    expr: str
    text: str
    color: str
    is_moment: bool = True


EVENTS = (
    Event("Checkpoints", f'{LAST}{{{RUN}, event="checkpoint"}} * 1000', "checkpoint", "blue"),
    Event("Steps that were not finite", f'{LAST}{{{RUN}, event="non_finite"}} * 1000', "step not finite", "red"),
    Event("Starts of services", f"process_start_time_seconds{{{RUN}}} * 1000", "{{job}} started", "orange"),
    Event(
        "Restarts of engines",
        f"changes(penstock_rollout_engine_restarts_total{{{RUN}}}[$__rate_interval]) > 0",
        "engine of {{instance}} restarted",
        "orange",
        is_moment=False,
    ),
)
PUSHES = Event("Pushes of weights", f'{LAST}{{{RUN}, event="push"}} * 1000', "push", "purple")


class PrometheusAnnotation(dashboard.AnnotationQuery):
    """With the keys of Grafana's Prometheus data source, which the schema of dashboards leaves to each source."""

    def __init__(self, event: Event) -> None:
        super().__init__(
            name=event.name,
            datasource=SOURCE,
            enable=True,
            icon_color=event.color,
            expr=event.expr,
        )
        self._event = event

    def to_json(self) -> dict[str, object]:
        own = {"titleFormat": self._event.text, "textFormat": "", "useValueForTime": self._event.is_moment}
        return super().to_json() | own


def annotations(pushed: Sequence[int]) -> dashboard.AnnotationContainer:
    """All events; pushes only on the panels with these numbers, since there may be one with every step."""
    made: list[dashboard.AnnotationQuery] = [PrometheusAnnotation(event) for event in EVENTS]
    if pushed:
        marks = PrometheusAnnotation(PUSHES)
        marks.filter_val = dashboard.AnnotationPanelFilter(exclude=False, ids=list(pushed))
        made.append(marks)
    return dashboard.AnnotationContainer(list_val=made)
