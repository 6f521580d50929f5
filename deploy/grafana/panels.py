"""The common parts of all dashboards: their frame, and three kinds of panels: a figure, a graph and a table.

Owns the look: 24 columns, one height per kind, a unit and a description on every panel. Invariant: every query selects
one run with `RUN`, so that no panel mixes two. Queries average over `$window`, which the viewer chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    FieldColor,
    IntervalVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.events import annotations
from deploy.grafana.source import RUN, SOURCE

COLUMNS = 24
HEADING_HEIGHT = 1
FIGURE_HEIGHT = 4
TABLE_HEIGHT = 6
GRAPH_HEIGHT = 8
GREEN, YELLOW, RED, PLAIN = "green", "yellow", "red", "text"
TAG = "penstock"
TOKENS = "si:tok/s"  # with a prefix for large numbers


@dataclass(frozen=True)
class Query:
    """PromQL, and the legend of its series."""

    expr: str
    legend: str = "{{run}}"


@dataclass(frozen=True)
class Heading:
    """The question that the panels below it answer."""

    title: str


@dataclass(frozen=True)
class Figure:
    """One number, or one for each value of a label. Width in columns.

    limits: where it turns yellow and red; falling ones are bad when low. details: the dashboard that shows more.
    """

    title: str
    description: str
    unit: str
    query: Query
    width: int = 4
    limits: tuple[float, float] | None = None
    decimals: int | None = None
    details: str = ""


@dataclass(frozen=True)
class Graph:
    """Curves over time. Width in columns. pushes: it marks each push of weights."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 12
    stacked: bool = False
    least: float | None = 0
    pushes: bool = False
    details: str = ""


@dataclass(frozen=True)
class Table:
    """The present series of one query, one in each line. columns: by name of a label, or `Value`, in order."""

    title: str
    description: str
    unit: str
    query: Query
    columns: dict[str, str]
    empty: str
    width: int = COLUMNS
    details: str = ""


Panel = Figure | Graph | Table


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


def make_dashboard(uid: str, title: str, description: str, panels: Sequence[Panel | Heading]) -> dashboard.Dashboard:
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
    pushed = []
    for number, (panel, place) in enumerate(_placed(panels), start=1):
        if isinstance(panel, Heading):
            made.with_row(Row(panel.title).id(number).grid_pos(place))
            continue
        made.with_panel(_panel(panel).id(number).grid_pos(place))
        if isinstance(panel, Graph) and panel.pushes:
            pushed.append(number)
    built = made.build()
    built.annotations = annotations(pushed)
    return built


def _run_variable() -> QueryVariable:
    """One run at a time. In a Prometheus that names none it is empty, and `run=""` selects series without the label."""
    return (
        QueryVariable("run")
        .label("Run")
        .datasource(SOURCE)
        .query("label_values(penstock_trainer_policy_version, run)")
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(False)
        .include_all(False)
    )


def _window_variable() -> IntervalVariable:
    values = ("1m", "5m", "15m", "1h")
    options = [dashboard.VariableOption(selected=each == "5m", text=each, value=each) for each in values]
    return (
        IntervalVariable("window").label("Averaged over").values(",".join(values)).options(options).current(options[1])
    )


def _shape(panel: Panel | Heading) -> tuple[int, int]:
    """Width and height."""
    match panel:
        case Heading():
            return COLUMNS, HEADING_HEIGHT
        case Figure():
            return panel.width, FIGURE_HEIGHT
        case Table():
            return panel.width, TABLE_HEIGHT
        case Graph():
            return panel.width, GRAPH_HEIGHT


def _placed(panels: Sequence[Panel | Heading]) -> list[tuple[Panel | Heading, dashboard.GridPos]]:
    """Rows are filled from the left; ValueError for one that is wider than the grid."""
    placed = []
    column = row = height = 0
    for panel in panels:
        width, tall = _shape(panel)
        if column + width > COLUMNS:
            column, row, height = 0, row + height, 0
        if height not in (0, tall):
            raise ValueError(
                f"panel {panel.title!r} is {tall} high in a row of {height}: expected full rows of one kind"
            )
        placed.append((panel, dashboard.GridPos(h=tall, w=width, x=column, y=row)))
        column, height = column + width, tall
    return placed


def _panel(panel: Panel) -> stat.Panel | timeseries.Panel | table.Panel:
    match panel:
        case Figure():
            return _figure(panel)
        case Graph():
            return _graph(panel)
        case Table():
            return _table(panel)


def _links(details: str) -> list[Builder[dashboard.DashboardLink]]:
    """To the dashboard that shows more, with the same run, window and time range."""
    if not details:
        return []
    url = f"/d/penstock-{details}?${{__url_time_range}}&${{__all_variables}}"
    return [DashboardLink("Details").type(dashboard.DashboardLinkType.LINK).url(url)]


def _figure(panel: Figure) -> stat.Panel:
    made = (
        stat.Panel()
        .title(panel.title)
        .description(panel.description)
        .links(_links(panel.details))
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


def _graph(panel: Graph) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .links(_links(panel.details))
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


def _table(panel: Table) -> table.Panel:
    order = {name: place for place, name in enumerate(panel.columns)}
    columns = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": panel.columns}
    return (
        table.Panel()
        .title(panel.title)
        .description(panel.description)
        .links(_links(panel.details))
        .datasource(SOURCE)
        .unit(panel.unit)
        .no_value(panel.empty)
        .align(common.FieldTextAlignment.AUTO)
        .with_transformation(dashboard.DataTransformerConfig(id_val="organize", options=columns))
        .with_target(
            Dataquery()
            .ref_id("A")
            .datasource(SOURCE)
            .expr(panel.query.expr)
            .legend_format(panel.query.legend)
            .format(PromQueryFormat.TABLE)
            .instant()
        )
    )


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
