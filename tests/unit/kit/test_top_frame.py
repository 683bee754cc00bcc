"""A frame of `tensorway top` from two looks, with numbers that can be checked by hand."""

from __future__ import annotations

from rich.console import Console

from tensorway.cli.top_frame import Look, Samples, frame_of, quantile
from tensorway.cli.top_look import read_samples
from tensorway.cli.top_view import COLUMNS, ORDERS, screen
from tensorway.load_report import LoadReport
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR, Registration

MEMBERS = (
    Registration(GATEWAY, "g1", "127.0.0.1:8001", {"ops": "127.0.0.1:8002"}),
    Registration(GATEWAY, "g2", "127.0.0.2:8001", {"ops": "127.0.0.2:8002"}),
    Registration(ORCHESTRATOR, "o1", "127.0.0.3:8011", {}), Registration(NODE, "n1", "127.0.0.4:8021", {}),
    Registration(GROUP, "m.0@n1", "127.0.0.4:9000", {"model": "m", "node": "n1", "epoch": "3"}),
)
LOAD = LoadReport("m", "r" * 64, 7.0, 0.01, 0.5, 1, 2, 0.7, 3, 4, 0, 0, ())


def gateway(ok: int, failed: int, at_most_10ms: int, cpu_s: float = 1.0) -> Samples:
    duration = "tensorway_gateway_request_duration_seconds_bucket"
    return read_samples(f'''# TYPE tensorway_gateway_requests counter
tensorway_gateway_requests_total{{model="m",code="OK"}} {ok}
tensorway_gateway_requests_total{{model="m",code="INTERNAL"}} {failed}
tensorway_gateway_requests_total{{model="",code="NOT_FOUND"}} 99
# TYPE tensorway_gateway_request_duration_seconds histogram
{duration}{{model="m",le="0.01"}} {at_most_10ms}
{duration}{{model="m",le="0.1"}} {ok + failed}
{duration}{{model="m",le="+Inf"}} {ok + failed}
# TYPE tensorway_gateway_in_flight_requests gauge
tensorway_gateway_in_flight_requests 5
# TYPE tensorway_ready gauge
tensorway_ready 1
# TYPE process_cpu_seconds counter
process_cpu_seconds_total {cpu_s}
''')


def look(at_s: float, **samples: Samples) -> Look:
    return Look(at_s, 1e9 + at_s, MEMBERS, (LOAD,), samples)


def test_rates_are_differences_summed_over_gateways() -> None:
    before = look(10.0, g1=gateway(100, 0, 100), g2=gateway(0, 0, 0))
    frame = frame_of(look(12.0, g1=gateway(300, 20, 310, 3.0), g2=gateway(100, 0, 50)), before)
    (model,) = frame.models
    assert (model.requests_per_s, model.failures_per_s) == (160.0, 10.0)
    # 320 requests, 260 of them within 10 ms: the median lies at 160/260 of the first bucket.
    assert model.p50_s == 0.01 * 160 / 260
    assert model.p99_s is not None
    assert 0.01 < model.p99_s <= 0.1
    assert (model.num_ready, model.num_wanted, model.queued_rows) == (1, 2, 3)
    (first, second, *_) = frame.members
    assert (first.is_ready, first.cpu, first.num_open) == (True, 1.0, 5)
    assert second.cpu == 0.0


def test_a_gateway_that_started_anew_counts_from_zero() -> None:
    (model,) = frame_of(look(11.0, g1=gateway(40, 0, 40)), look(10.0, g1=gateway(1000, 10, 500))).models
    assert model.requests_per_s == 40.0
    assert model.failures_per_s == 0.0


def test_what_the_registry_knows_is_shown_where_no_ops_port_answers() -> None:
    frame = frame_of(look(11.0), look(10.0))
    (model,) = frame.models
    assert model.requests_per_s == LOAD.arrival_rows_per_s
    assert model.p50_s is None
    assert frame.unreached == ("g1", "g2", "o1", "n1")
    assert [(group.id, group.epoch, group.ranks) for group in frame.groups] == [("m.0@n1", 3, ())]
    assert all(member.is_ready is None for member in frame.members)


def test_a_quantile_lies_within_its_bucket() -> None:
    infinity = float("inf")
    assert quantile([], 0.5) is None
    assert quantile([(0.1, 0.0), (infinity, 0.0)], 0.5) is None
    assert quantile([(0.1, 0.0), (0.2, 10.0), (infinity, 10.0)], 0.5) == 0.1 + 0.1 * 0.5
    assert quantile([(0.1, 0.0), (0.2, 5.0), (infinity, 10.0)], 0.99) == 0.2  # the last bound that is known


def test_a_frame_fits_every_width_and_height() -> None:
    node = read_samples("\n".join(
        f'tensorway_node_group_epochs_total{{model="m",group="m.{number}@n1"}} 1\n'
        f'tensorway_node_group_state{{model="m",group="m.{number}@n1",state="{"warming" if number == 150 else "ready"}"}} 1\n'
        + "\n".join(f'tensorway_rank_ready{{model="m",group="m.{number}@n1",rank="{rank}",device="cuda:{rank}"}} 1' for rank in range(20))
        for number in range(200)
    ) + "\n")
    frame = frame_of(look(11.0, g1=gateway(9, 1, 5), n1=node), look(10.0, g1=gateway(0, 0, 0), n1=node))
    assert len(frame.groups) == 200
    for width in (60, 80, 100, 200):
        console = Console(width=width, height=30, force_terminal=True, color_system=None)
        with console.capture() as captured:
            console.print(screen(frame, console))
        lines = captured.get().splitlines()
        assert len(lines) <= 30
        assert max(map(len, lines)) <= width
        # The one that does not serve is never among those that there is no room for.
        assert any("m.150@n1" in line and "warming" in line for line in lines)
        assert any("more" in line for line in lines)


def test_models_can_be_ordered_by_every_number_that_has_an_order() -> None:
    assert ORDERS[0] is COLUMNS[0]
    assert {column.title for column in ORDERS} == {"model", "req/s", "p99 ms", "queue", "tok/s", "busy", "err/s"}
