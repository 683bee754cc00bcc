"""Writes the Grafana dashboards in dashboards/: `python deploy/grafana/dashboards.py`, or with `--check` only says which are stale."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from panels import Dashboard, Panel, Row, stat, written

FOLDER: Final = Path(__file__).parent / "dashboards"
#: How a query picks what the dashboard's variables say.
M: Final = 'model=~"$model"'
N: Final = 'instance=~"$instance"'
P50: Final = "histogram_quantile(0.5, sum by (model, le)"
P95: Final = "histogram_quantile(0.95, sum by (model, le)"

OVERVIEW: Final = Dashboard("tensorway-mesh", "Tensorway / Mesh", "What is asked of the mesh, how it goes, and what it takes.", (
    Row("Now", (
        stat("Requests", 'sum(model:tensorway_gateway_requests:rate1m) or vector(0)', "reqps"),
        stat("Failures", "max(model:tensorway_gateway_failures:ratio_rate5m) or vector(0)", "percentunit",
             ((None, "green"), (0.01, "orange"), (0.05, "red")), "Of the model that has most, those that are not the caller's."),
        stat("p99", "histogram_quantile(0.99, sum by (le) (rate(tensorway_gateway_request_duration_seconds_bucket[5m])))", "s",
             ((None, "green"), (1, "orange"), (5, "red"))),
        stat("Tokens", "sum(model:tensorway_orchestrator_tokens:rate1m) or vector(0)", "short", said="Tokens a second."),
        stat("Replicas missing", "sum(clamp_min(max by (model) (tensorway_gateway_wanted_replicas) "
             "- max by (model) (tensorway_gateway_ready_replicas), 0))", steps=((None, "green"), (1, "orange"))),
        stat("Members not up", 'count(up{job=~"tensorway-.*"} == 0) or vector(0)', steps=((None, "green"), (1, "red"))),
    )),
    Row("Requests", (
        Panel("Requests by model", (("model:tensorway_gateway_requests:rate1m", "{{model}}"),), "reqps", stacked=True),
        Panel("Requests by code", (('sum by (code) (model_code:tensorway_gateway_requests:rate1m)', "{{code}}"),), "reqps", stacked=True),
        Panel("Goodput", (("model:tensorway_gateway_goodput:rate1m", "{{model}}"),), "reqps", said="Requests that were answered."),
        Panel("p50", (("model:tensorway_gateway_request_duration_seconds:p50_5m", "{{model}}"),), "s"),
        Panel("p99", (("model:tensorway_gateway_request_duration_seconds:p99_5m", "{{model}}"),), "s"),
        Panel("Share of slow requests", (("model:tensorway_gateway_slow:ratio_rate5m", "{{model}}"),), "percentunit",
              said="Beyond the objective in rules/recording.yml."),
        Panel("In flight at gateways", (("sum by (instance) (tensorway_gateway_in_flight_requests)", "{{instance}}"),)),
        Panel("Sent to orchestrators", (("sum by (orchestrator) (rate(tensorway_gateway_sent_total[1m]))", "{{orchestrator}}"),), "reqps"),
        Panel("Bytes in flight at gateways", (("sum by (instance) (tensorway_gateway_in_flight_bytes)", "{{instance}}"),), "bytes"),
    )),
    Row("Saturation", (
        Panel("Rows waiting", (("model:tensorway_orchestrator_queued_rows:sum", "{{model}}"),)),
        Panel("Queue time, p95", (("model:tensorway_orchestrator_queue_seconds:p95_5m", "{{model}}"),), "s"),
        Panel("Groups busy", (("model:tensorway_orchestrator_utilisation:ratio", "{{model}}"),), "percentunit", top=1),
    )),
    Row("Failures and recovery", (
        Panel("Retries, hedges, reroutes", (
            ("sum(rate(tensorway_orchestrator_retries_total[5m]))", "retries"),
            ("sum(rate(tensorway_orchestrator_hedges_total[5m]))", "hedges"),
            ("sum(rate(tensorway_gateway_reroutes_total[5m]))", "reroutes"),
            ("sum(rate(tensorway_orchestrator_stream_restarts_total[5m]))", "streams continued"),
        ), "reqps"),
        Panel("Ejections", ((
            "sum by (model, reason) (increase(tensorway_orchestrator_ejections_total[5m]))", "{{model}} {{reason}}"),),
              said="Groups left out for a while, in five minutes. Empty where there was none."),
        Panel("Groups by standing", (("sum by (state) (tensorway_orchestrator_groups)", "{{state}}"),), stacked=True,
              said="As orchestrators see them; each counts for itself."),
    )),
    Row("Links, registry and processes", (
        Panel("Frames per message", ((
            "instance:tensorway_link_frames_per_message:ratio_rate5m", "{{job}} {{instance}} {{direction}}"),),
              said="Above 1: frames that waited left together."),
        Panel("Link traffic", ((
            'sum by (job, instance) (rate(tensorway_link_bytes_total{direction="sent"}[1m]))', "{{job}} {{instance}}"),), "Bps"),
        Panel("Registry errors", ((
            "sum by (job, instance) (rate(tensorway_registry_errors_total[5m]))", "{{job}} {{instance}}"),), "ops"),
        Panel("CPU", (('rate(process_cpu_seconds_total{job=~"tensorway-.*"}[1m])', "{{job}} {{instance}}"),), said="Cores; without ranks."),
        Panel("Memory", (('process_resident_memory_bytes{job=~"tensorway-.*"}', "{{job}} {{instance}}"),), "bytes", said="Without ranks."),
        Panel("Versions", (("count by (service, version) (tensorway_build_info)", "{{service}} {{version}}"),), stacked=True),
    )),
))

MODEL: Final = Dashboard("tensorway-model", "Tensorway / Model", "One model: what is asked of it, where the time goes, and who does it.", (
    Row("Requests", (
        Panel("By code", ((f"model_code:tensorway_gateway_requests:rate1m{{{M}}}", "{{model}} {{code}}"),), "reqps", stacked=True),
        Panel("Duration", (
            (f"model:tensorway_gateway_request_duration_seconds:p50_5m{{{M}}}", "{{model}} p50"),
            (f"model:tensorway_gateway_request_duration_seconds:p95_5m{{{M}}}", "{{model}} p95"),
            (f"model:tensorway_gateway_request_duration_seconds:p99_5m{{{M}}}", "{{model}} p99"),
        ), "s"),
        Panel("Durations", ((
            f"sum by (le) (increase(tensorway_gateway_request_duration_seconds_bucket{{{M}}}[$__rate_interval]))", "{{le}}"),),
            "s", "heatmap"),
        Panel("Failures", ((f"model:tensorway_gateway_failures:ratio_rate5m{{{M}}}", "{{model}}"),), "percentunit"),
        Panel("Received", ((f"sum by (model) (rate(tensorway_gateway_received_bytes_total{{{M}}}[1m]))", "{{model}}"),), "Bps"),
        Panel("Open in orchestrators", ((f"sum by (model) (tensorway_orchestrator_open_requests{{{M}}})", "{{model}}"),)),
    )),
    Row("Queue and batches", (
        Panel("Queue time", (
            (f"{P50} (rate(tensorway_orchestrator_queue_seconds_bucket{{{M}}}[5m])))", "{{model}} p50"),
            (f"model:tensorway_orchestrator_queue_seconds:p95_5m{{{M}}}", "{{model}} p95"),
        ), "s"),
        Panel("Rows waiting", ((f"model:tensorway_orchestrator_queued_rows:sum{{{M}}}", "{{model}}"),)),
        Panel("Rows in a batch, mean", ((f"model:tensorway_orchestrator_batch_rows:mean_rate5m{{{M}}}", "{{model}}"),)),
        Panel("Step time", (
            (f"{P50} (rate(tensorway_orchestrator_step_seconds_bucket{{{M}}}[5m])))", "{{model}} p50"),
            (f"{P95} (rate(tensorway_orchestrator_step_seconds_bucket{{{M}}}[5m])))", "{{model}} p95"),
        ), "s"),
        Panel("Rows in a batch", ((
            f"sum by (le) (increase(tensorway_orchestrator_batch_rows_bucket{{{M}}}[$__rate_interval]))", "{{le}}"),), "short", "heatmap"),
        Panel("Batches", ((f"sum by (model) (rate(tensorway_orchestrator_step_seconds_count{{{M}}}[1m]))", "{{model}}"),), "ops"),
    )),
    Row("Replicas", (
        Panel("Replicas", (
            (f"max by (model) (tensorway_gateway_wanted_replicas{{{M}}})", "{{model}} wanted"),
            (f"max by (model) (tensorway_gateway_ready_replicas{{{M}}})", "{{model}} ready"),
            (f"sum by (model) (tensorway_orchestrator_predicted_replicas{{{M}}})", "{{model}} needed"),
        )),
        Panel("Groups busy", ((f"model:tensorway_orchestrator_utilisation:ratio{{{M}}}", "{{model}}"),), "percentunit", top=1),
        Panel("Rows that come", ((f"sum by (model) (tensorway_orchestrator_arrival_rows_per_second{{{M}}})", "{{model}}"),), "rowsps"),
        Panel("Sent to groups", ((
            f"sum by (group) (rate(tensorway_orchestrator_sent_total{{{M}}}[1m]))", "{{group}}"),), "ops", stacked=True),
        Panel("In flight at groups", ((f"sum by (group) (tensorway_orchestrator_group_in_flight{{{M}}})", "{{group}}"),)),
        Panel("Times formed", ((f"sum by (group) (tensorway_node_group_epochs_total{{{M}}})", "{{group}}"),)),
    )),
    Row("Recovery", (
        Panel("Attempts repeated or lost", (
            (f"sum by (model) (rate(tensorway_orchestrator_retries_total{{{M}}}[5m]))", "{{model}} retries"),
            (f"sum by (model) (rate(tensorway_orchestrator_lost_attempts_total{{{M}}}[5m]))", "{{model}} batches lost"),
        ), "ops"),
        Panel("Hedges", (
            (f"sum by (model) (rate(tensorway_orchestrator_hedges_total{{{M}}}[5m]))", "{{model}} sent"),
            (f"sum by (model) (rate(tensorway_orchestrator_hedge_wins_total{{{M}}}[5m]))", "{{model}} won"),
        ), "ops"),
        Panel("Stuck, quarantined, handed on", (
            (f"sum by (model) (increase(tensorway_orchestrator_stuck_batches_total{{{M}}}[5m]))", "{{model}} stuck batches"),
            (f"sum by (model) (increase(tensorway_orchestrator_quarantined_total{{{M}}}[5m]))", "{{model}} quarantined"),
            (f"sum by (model) (increase(tensorway_orchestrator_fallbacks_total{{{M}}}[5m]))", "{{model}} answered by the fallback"),
        )),
    )),
), (("model", "Model", "tensorway_gateway_wanted_replicas"),))

NODES: Final = Dashboard("tensorway-nodes", "Tensorway / Nodes and ranks", "The machines: groups, their ranks, and what they use.", (
    Row("Groups", (
        Panel("Groups by state", ((f"sum by (state) (tensorway_node_group_state{{{N},{M}}})", "{{state}}"),), stacked=True),
        Panel("Formed anew, in 15 minutes", ((f"increase(tensorway_node_group_epochs_total{{{N},{M}}}[15m])", "{{group}}"),)),
        Panel("Ranks ready", ((f"sum by (group) (tensorway_rank_ready{{{N},{M}}})", "{{group}}"),), stacked=True),
    )),
    Row("Ranks", (
        Panel("Memory", ((f"tensorway_rank_memory_bytes{{{N},{M}}}", "{{group}} rank {{rank}} {{device}}"),), "bytes",
              said="Of the rank's device; on a CPU, its resident memory."),
        Panel("Memory of what it may use", ((
            f"rank:tensorway_rank_memory:ratio{{{N},{M}}}", "{{group}} rank {{rank}} {{device}}"),), "percentunit", top=1,
              said="Empty where nothing limits it."),
        Panel("Weights", ((f"tensorway_rank_weights_bytes{{{N},{M}}}", "{{group}} rank {{rank}}"),), "bytes"),
        Panel("Busy", ((f"tensorway_rank_busy_ratio{{{N},{M}}}", "{{group}} rank {{rank}}"),), "percentunit", top=1),
        Panel("Steps", ((f"rate(tensorway_rank_steps_total{{{N},{M}}}[1m])", "{{group}} rank {{rank}}"),), "ops"),
        Panel("CUDA devices", ((f"tensorway_node_devices{{{N}}}", "{{instance}}"),)),
    )),
    Row("Node services", (
        Panel("CPU", ((f'rate(process_cpu_seconds_total{{job="tensorway-node",{N}}}[1m])', "{{instance}}"),)),
        Panel("Memory", ((f'process_resident_memory_bytes{{job="tensorway-node",{N}}}', "{{instance}}"),), "bytes"),
        Panel("Registry reachable", ((f'tensorway_registry_reachable{{job="tensorway-node",{N}}}', "{{instance}}"),), top=1),
    )),
), (("model", "Model", "tensorway_node_group_epochs_total"), ("instance", "Node", "tensorway_node_devices")))

TOKENS: Final = Dashboard("tensorway-tokens", "Tensorway / Tokens", "Models that generate: how soon, how fast, and for how many at once.", (
    Row("For clients", (
        Panel("Tokens", ((f"model:tensorway_orchestrator_tokens:rate1m{{{M}}}", "{{model}}"),), "short", said="A second."),
        Panel("First token", (
            (f"model:tensorway_gateway_first_delta_seconds:p50_5m{{{M}}}", "{{model}} p50"),
            (f"model:tensorway_gateway_first_delta_seconds:p95_5m{{{M}}}", "{{model}} p95"),
        ), "s"),
        Panel("Between tokens", (
            (f"model:tensorway_orchestrator_inter_token_seconds:p50_5m{{{M}}}", "{{model}} p50"),
            (f"model:tensorway_orchestrator_inter_token_seconds:p99_5m{{{M}}}", "{{model}} p99"),
        ), "s", said="As they reach the orchestrator: a client that reads slowly does not show."),
        Panel("First token", ((
            f"sum by (le) (increase(tensorway_gateway_first_delta_seconds_bucket{{{M}}}[$__rate_interval]))", "{{le}}"),), "s", "heatmap"),
        Panel("Messages to clients", ((
            f"sum by (model) (rate(tensorway_gateway_stream_messages_total{{{M}}}[1m]))", "{{model}}"),), "ops"),
        Panel("Tokens of an answer, mean", ((
            f"sum by (model) (rate(tensorway_orchestrator_tokens_total{{{M}}}[5m])) "
            f"/ (sum by (model) (rate(tensorway_orchestrator_requests_total{{{M}}}[5m])) > 0)", "{{model}}"),)),
        Panel("Whole answers", ((
            f"model:tensorway_gateway_request_duration_seconds:p95_5m{{{M}}} and on (model) tensorway_gateway_first_delta_seconds_count",
            "{{model}} p95"),), "s"),
    )),
    Row("In the mesh", (
        Panel("Open streams", ((f"sum by (model) (tensorway_orchestrator_open_streams{{{M}}})", "{{model}}"),)),
        Panel("Answers that wait for a place", ((f"sum by (model) (tensorway_orchestrator_waiting_choices{{{M}}})", "{{model}}"),)),
        Panel("Streams kept for a reader", (("sum(tensorway_orchestrator_parked_streams)", "kept"),)),
        Panel("Answers in groups", (
            (f"sum by (group) (tensorway_node_running_answers{{{M}}})", "{{group}} running"),
            (f"sum by (group) (tensorway_node_waiting_answers{{{M}}})", "{{group}} waiting"),
        )),
        Panel("Free blocks of keys and values", ((f"sum by (group) (tensorway_node_free_blocks{{{M}}})", "{{group}}"),)),
        Panel("Continued and resumed", (
            (f"sum by (model) (rate(tensorway_orchestrator_stream_restarts_total{{{M}}}[5m]))", "{{model}} continued elsewhere"),
            (f"sum by (model) (rate(tensorway_orchestrator_stream_resumes_total{{{M}}}[5m]))", "{{model}} resumed by the reader"),
        ), "ops"),
    )),
), (("model", "Model", "tensorway_orchestrator_tokens_total"),))

DASHBOARDS: Final = {"mesh": OVERVIEW, "model": MODEL, "nodes": NODES, "tokens": TOKENS}


def main() -> int:
    """Writes what is stale, or names it; returns 1 where a check finds any."""
    is_check, status = "--check" in sys.argv[1:], 0
    for name, dashboard in DASHBOARDS.items():
        path, text = FOLDER / f"{name}.json", written(dashboard)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if is_check:
            print(f"{path} is stale; run `python deploy/grafana/dashboards.py`", file=sys.stderr)
            status = 1
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
