"""What a dashboard is made of, and its JSON as Grafana reads it: units, legends and thresholds are the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH: Final = 24


@dataclass(frozen=True)
class Panel:
    """One panel. `queries` are (expression, legend)."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    said: str = ""
    stacked: bool = False
    #: (from, colour); the first has no lower bound.
    steps: Sequence[tuple[float | None, str]] = ()
    top: float | None = None


@dataclass(frozen=True)
class Row:
    """A heading and the panels under it."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """`variables` are (name, label, metric whose label `name` gives the values)."""

    uid: str
    title: str
    said: str
    rows: Sequence[Row]
    variables: Sequence[tuple[str, str, str]] = field(default=())


def stat(
    title: str, expression: str, unit: str = "short", steps: Sequence[tuple[float | None, str]] = ((None, "green"),), said: str = ""
) -> Panel:
    """One number."""
    return Panel(title, ((expression, ""),), unit, "stat", 4, 4, said, steps=steps)


def written(dashboard: Dashboard) -> str:
    """The file of a dashboard."""
    return json.dumps(_document(dashboard), indent=1) + "\n"


def expressions(dashboard: Dashboard) -> Iterable[str]:
    """Every query of a dashboard, with its variables standing for all."""
    for row in dashboard.rows:
        for panel in row.panels:
            for expression, _ in panel.queries:
                yield expression.replace("$__rate_interval", "1m").replace("$model", ".+").replace("$instance", ".+")


def _document(dashboard: Dashboard) -> dict[str, Any]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}
    return {
        "uid": dashboard.uid, "title": dashboard.title, "description": dashboard.said, "tags": ["tensorway"], "editable": True,
        "schemaVersion": 39, "version": 1, "refresh": "10s", "time": {"from": "now-30m", "to": "now"}, "timezone": "browser",
        "graphTooltip": 1,
        "annotations": {"list": [{
            "name": "Alerts", "datasource": _SOURCE, "enable": True, "iconColor": "red", "titleFormat": "{{alertname}}",
            "expr": 'ALERTS{alertname=~"Tensorway.*",alertstate="firing"}', "step": "60s",
        }]},
        "links": [{
            "title": "Tensorway", "type": "dashboards", "tags": ["tensorway"], "asDropdown": True, "includeVars": True, "keepTime": True,
        }],
        "templating": {"list": [source, *(_variable(*variable) for variable in dashboard.variables)]},
        "panels": list(_panels(dashboard.rows)),
    }


def _variable(name: str, label: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {name})"
    return {
        "name": name, "label": label, "type": "query", "datasource": _SOURCE, "query": {"query": query, "refId": name}, "definition": query,
        "refresh": 2, "sort": 1, "multi": True, "includeAll": True, "allValue": ".+", "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    number, y = 1, 0
    for row in rows:
        place = {"x": 0, "y": y, "w": _WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "panels": [], "gridPos": place}
        number, y, x = number + 1, y + 1, 0
        for panel in row.panels:
            if x + panel.width > _WIDTH:
                x, y = 0, y + panel.height
            yield _panel(panel, number, x, y)
            number, x = number + 1, x + panel.width
        y += row.panels[-1].height


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + at), "expr": expression, "legendFormat": legend, "datasource": _SOURCE, "range": True,
         **({"format": "heatmap"} if panel.kind == "heatmap" else {})}
        for at, (expression, legend) in enumerate(panel.queries)
    ]
    found = {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.said, "datasource": _SOURCE, "targets": targets,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height}, "options": _options(panel),
    }
    if panel.kind != "heatmap":
        found["fieldConfig"] = {"defaults": _defaults(panel), "overrides": []}
    return found


def _defaults(panel: Panel) -> dict[str, Any]:
    steps = [{"value": bound, "color": colour} for bound, colour in panel.steps or ((None, "green"),)]
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 25 if panel.stacked else 8, "showPoints": "never", "spanNulls": False,
              "stacking": {"mode": "normal" if panel.stacked else "none"}}
    return {
        "unit": panel.unit, "min": 0, **({} if panel.top is None else {"max": panel.top}),
        "thresholds": {"mode": "absolute", "steps": steps}, "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
        **({"custom": custom} if panel.kind == "timeseries" else {}),
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area", "textMode": "value"}
    if panel.kind == "heatmap":
        colour = {"scheme": "Blues", "mode": "scheme"}
        return {"calculate": False, "yAxis": {"unit": panel.unit}, "color": colour, "cellGap": 1, "tooltip": {"mode": "single"}}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
