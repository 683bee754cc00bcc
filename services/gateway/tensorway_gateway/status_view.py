"""What the status page is told, as plain JSON values. Pure: takes what is known, touches nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from tensorway.loads import ModelLoad
from tensorway.registry.port import Registration
from tensorway_gateway.load import SummedLoad, sum_loads
from tensorway_gateway.models import Model
from tensorway_gateway.recent_errors import FailedRequest
from tensorway_gateway.statistics import BUCKETS_S, ModelTotals, Statistics

_LOG = logging.getLogger(__name__)
#: Of a group's document; what else stands there changes too often to be true.
_RANK_FACTS: Final = ("rank", "node", "device", "state", "detail")
_MAX_CHARS: Final = 300


def describe_members(members: Iterable[Registration]) -> list[dict[str, Any]]:
    """Every live registration but groups."""
    return [{"kind": one.kind, "id": one.id, "endpoint": one.endpoint, **_told(one, "ops", "zone", "pid")} for one in members]


def describe_models(
    models: Iterable[Model], statistics: Statistics, said: Sequence[tuple[str, Sequence[ModelLoad]]]
) -> list[dict[str, Any]]:
    """Every model: how it stands, its load, and this gateway's counts of it since its start."""
    return [_describe_model(model, statistics.models.get(model.name), sum_loads(model, said)) for model in models]


def describe_groups(documents: Mapping[str, bytes], num_answers: Mapping[str, int]) -> list[dict[str, Any]]:
    """Every group of every live node, with its ranks; `num_answers` by group and epoch, as this gateway has counted them."""
    found: list[dict[str, Any]] = []
    for node, document in sorted(documents.items()):
        try:
            groups = json.loads(document)["groups"]
            found.extend(_describe_group(node, group, num_answers) for group in groups)
        except (ValueError, KeyError, TypeError) as error:
            _LOG.error("the document of node %s cannot be read and is left out: %s", node, error)
    return found


def describe_errors(errors: Iterable[FailedRequest]) -> list[dict[str, Any]]:
    """The last failed requests, newest first."""
    return [asdict(error) for error in errors]


def _describe_model(model: Model, totals: ModelTotals | None, load: SummedLoad) -> dict[str, Any]:
    serving = model.serving
    totals = totals or ModelTotals()
    return {
        "name": model.name, "revision": serving.spec.revision, "version": serving.spec.version, "engine": serving.spec.engine,
        "generates": serving.spec.generation is not None, "state": serving.state.value, "reason": serving.reason[:_MAX_CHARS],
        "num_wanted": model.num_replicas, "num_ready": serving.num_ready_replicas,
        "requests": {status.name: number for status, number in totals.statuses.items()},
        "duration_buckets": list(totals.buckets), "first_delta_buckets": list(totals.first_delta_buckets),
        "num_messages": totals.num_messages,
        "arrival_rows_per_s": load.arrival_rows_per_s, "queue_s": load.queue_s, "utilisation": load.utilisation,
        "waiting_rows": load.waiting_rows, "num_open": load.num_open,
        "orchestrators": {name: part.arrival_rows_per_s for name, part in load.parts},
    }


def _describe_group(node: str, group: Mapping[str, Any], num_answers: Mapping[str, int]) -> dict[str, Any]:
    # Orchestrators name a group with its epoch.
    number = num_answers.get(f"{group['id']}#{group['epoch']}", 0)
    return {
        "id": str(group["id"]), "model": str(group["model"]), "revision": str(group["revision"]), "node": node,
        "state": str(group["state"]), "epoch": int(group["epoch"]), "detail": str(group.get("detail", ""))[:_MAX_CHARS],
        "reason": str(group.get("reason", ""))[:_MAX_CHARS], "num_answers": number,
        "ranks": [{name: rank.get(name) for name in _RANK_FACTS} for rank in group.get("ranks", ())],
    }


def _told(member: Registration, *words: str) -> dict[str, str]:
    return {word: member.metadata.get(word, "") for word in words}


def bucket_bounds_s() -> tuple[float, ...]:
    """Upper bounds of `duration_buckets` and `first_delta_buckets`; one more bucket counts what is longer than all."""
    return BUCKETS_S
