"""The common parts of all dashboards: their frame, and two kinds of panels, a figure and a graph.

Owns the look: 24 columns, one height per kind, a unit and a description on every panel. Queries select with `RUN`, and
average over `$window`, which the viewer chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import stat, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    FieldColor,
    IntervalVariable,
    QueryVariable,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard

RUN = 'run=~"$run"'
COLUMNS = 24
FIGURE_HEIGHT = 4
GRAPH_HEIGHT = 8
GREEN, YELLOW, RED, PLAIN = "green", "yellow", "red", "text"
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "penstock"
TOKENS = "si:tok/s"  # with a prefix for large numbers


@dataclass(frozen=True)
class Query:
    """PromQL, and the legend of its series."""

    expr: str
    legend: str = "{{run}}"


@dataclass(frozen=True)
class Figure:
    """One number per run. `limits`: where it turns yellow and red; falling ones are bad when low. Width in columns."""

    title: str
    description: str
    unit: str
    query: Query
    width: int = 4
    limits: tuple[float, float] | None = None
    decimals: int | None = None


@dataclass(frozen=True)
class Graph:
    """Curves over time. Width in columns."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 12
    stacked: bool = False
    least: float | None = 0


def rate(metric: str, by: str = "run", labels: str = "") -> str:
    """Increase per second of a counter, added up."""
    return f"sum by ({by}) (rate({metric}{{{_selector(labels)}}}[$window]))"


def quantile(share: float, histogram: str, by: str = "run", labels: str = "") -> str:
    """Quantile of a histogram over the window."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', f'{by}, le', labels)})"


def value(metric: str, by: str = "run", labels: str = "", how: str = "max") -> str:
    """A gauge, of which each run has one, or one for each value of `by`."""
    return f"{how} by ({by}) ({metric}{{{_selector(labels)}}})"


def _selector(labels: str) -> str:
    return f"{RUN}, {labels}" if labels else RUN


def make_dashboard(uid: str, title: str, description: str, panels: Sequence[Figure | Graph]) -> dashboard.Dashboard:
    """The dashboard with its variables, its links to the others and its panels, placed from left to right."""
    made = (
        Dashboard(f"Penstock / {title}")
        .uid(f"penstock-{uid}")
        .description(description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            DashboardLink("Penstock")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .keep_time(True)
            .include_vars(True)
        )
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_run_variable())
        .with_variable(_window_variable())
    )
    for number, (panel, place) in enumerate(_placed(panels), start=1):
        made.with_panel(_figure(panel, number, place) if isinstance(panel, Figure) else _graph(panel, number, place))
    return made.build()


def _run_variable() -> QueryVariable:
    """All: also the run of a Prometheus that names none, such as that of docker compose."""
    everything = dashboard.VariableOption(selected=True, text="All", value="$__all")
    return (
        QueryVariable("run")
        .label("Run")
        .datasource(SOURCE)
        .query("label_values(penstock_trainer_policy_version, run)")
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .include_all(True)
        .all_value(".*")
        .current(everything)
    )


def _window_variable() -> IntervalVariable:
    values = ("1m", "5m", "15m", "1h")
    options = [dashboard.VariableOption(selected=each == "5m", text=each, value=each) for each in values]
    return (
        IntervalVariable("window").label("Averaged over").values(",".join(values)).options(options).current(options[1])
    )


def _placed(panels: Sequence[Figure | Graph]) -> list[tuple[Figure | Graph, dashboard.GridPos]]:
    """Rows are filled from the left; ValueError for one that is wider than the grid."""
    placed = []
    column = row = height = 0
    for panel in panels:
        tall = FIGURE_HEIGHT if isinstance(panel, Figure) else GRAPH_HEIGHT
        if column + panel.width > COLUMNS:
            column, row, height = 0, row + height, 0
        if height not in (0, tall):
            raise ValueError(
                f"panel {panel.title!r} is {tall} high in a row of {height}: expected full rows of one kind"
            )
        placed.append((panel, dashboard.GridPos(h=tall, w=panel.width, x=column, y=row)))
        column, height = column + panel.width, tall
    return placed


def _figure(panel: Figure, number: int, place: dashboard.GridPos) -> stat.Panel:
    made = (
        stat.Panel()
        .id(number)
        .grid_pos(place)
        .title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .unit(panel.unit)
        .thresholds(_thresholds(panel.limits))
        .color_scheme(FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
        .no_value("not known yet")
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.AREA)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_target(panel.query, 0))
    )
    return made if panel.decimals is None else made.decimals(panel.decimals)


def _graph(panel: Graph, number: int, place: dashboard.GridPos) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .id(number)
        .grid_pos(place)
        .title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .unit(panel.unit)
        .color_scheme(FieldColor().mode(dashboard.FieldColorModeId.PALETTE_CLASSIC))
        .line_width(1)
        .fill_opacity(25 if panel.stacked else 0)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
    )
    if panel.stacked:
        made.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if panel.least is not None:
        made.axis_soft_min(panel.least)
    for index, query in enumerate(panel.queries):
        made.with_target(_target(query, index))
    return made


def _target(query: Query, index: int) -> Dataquery:
    return (
        Dataquery()
        .ref_id(chr(ord("A") + index))
        .datasource(SOURCE)
        .expr(query.expr)
        .legend_format(query.legend)
        .range()
    )


def _thresholds(limits: tuple[float, float] | None) -> ThresholdsConfig:
    """Green, yellow and red from the first limit to the second; the other way round if the second is lower.

    Without limits a number has the colour of text.
    """
    if limits is None:
        steps = [dashboard.Threshold(color=PLAIN)]
    elif limits[0] < limits[1]:
        steps = [dashboard.Threshold(color=GREEN), *_steps(limits, (YELLOW, RED))]
    else:
        steps = [dashboard.Threshold(color=RED), *_steps((limits[1], limits[0]), (YELLOW, GREEN))]
    return ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)


def _steps(values: tuple[float, float], colors: tuple[str, str]) -> list[dashboard.Threshold]:
    return [dashboard.Threshold(value=each, color=color) for each, color in zip(values, colors, strict=True)]


def as_json(made: dashboard.Dashboard) -> str:
    """The JSON of a dashboard, for the repository and for Grafana."""
    return JSONEncoder(sort_keys=True, indent=2).encode(made) + "\n"
