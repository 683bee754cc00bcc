"""What a node decides: devices, partners, the cause of an epoch's end, and the launch of each rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervised import chain

from tensorway.errors import FailedPrecondition, Overloaded
from tensorway.model_directory import ModelYaml, load_directory
from tensorway_worker.devices import DevicePool
from tensorway_worker.hosted_rank import exit_words
from tensorway_worker.node import offered_directories
from tensorway_worker.orders import BlockOrders, launches
from tensorway_worker.placement import Partner, Replica, partners_for
from tensorway_worker.settings import NodeSettings
from tensorway_worker.verdict import Finding, Weight, cause_of


def model(**keys: object) -> ModelYaml:
    spec = [{"name": "x", "dtype": "FP32", "shape": ["rows"]}]
    return ModelYaml.model_validate({"name": "m", "engine": "python", "inputs": spec, "outputs": spec, **keys})


def test_devices_go_to_the_least_used_and_come_back() -> None:
    pool = DevicePool(("cuda:0", "cuda:1"))
    first = pool.acquire(model(), 2)
    assert first == (("cuda:0",), ("cuda:1",))
    second = pool.acquire(model(), 1)
    assert second == (("cuda:0",),)
    pool.release(first)
    assert pool.acquire(model(), 2) == (("cuda:1",), ("cuda:0",))
    assert pool.acquire(model(device="cpu"), 2) == (("cpu",), ("cpu",))
    pool.release(())


def test_a_custom_group_is_one_rank_with_several_devices() -> None:
    custom = model(parallel={"custom": 2})
    assert DevicePool(("cuda:0", "cuda:1", "cuda:2")).acquire(custom, 1) == (("cuda:0", "cuda:1"),)
    assert DevicePool(()).acquire(custom, 1) == (("cpu",),)
    with pytest.raises(Overloaded, match="wants 2 CUDA devices and this node has 1"):
        DevicePool(("cuda:0",)).acquire(custom, 1)


@given(st.lists(st.integers(1, 4), max_size=8))
def test_devices_in_use_add_up(wishes: list[int]) -> None:
    pool = DevicePool(("cuda:0", "cuda:1", "cuda:2"))
    held = [pool.acquire(model(), wish) for wish in wishes]
    for acquired in held:
        pool.release(acquired)
    assert pool._in_use == []


OFFERS = {"a": frozenset({"r"}), "b": frozenset({"r"}), "c": frozenset({"other"}), "d": frozenset({"r"})}
ENDPOINTS = {"a": "a:1", "b": "b:1", "c": "c:1"}


def test_partners_are_other_live_nodes_with_the_revision_the_idle_ones_first() -> None:
    replica = Replica("m", "r", 0)
    assert partners_for(replica, "a", OFFERS, ENDPOINTS, {}) == (Partner("b", "b:1"),)
    assert [partner.node for partner in partners_for(replica, "z", OFFERS, ENDPOINTS, {"a": 3, "b": 1})] == ["b", "a"]
    assert partners_for(Replica("m", "nobody's", 0), "a", OFFERS, ENDPOINTS, {}) == ()


@pytest.mark.parametrize(
    ("findings", "culprit"),
    [
        ([(0, Weight.CONSEQUENCE, 1.0), (1, Weight.OWN, 1.05)], 1),
        ([(0, Weight.CONSEQUENCE, 1.0), (2, Weight.NODE_LOST, 1.05), (1, Weight.CONSEQUENCE, 0.9)], 2),
        ([(1, Weight.SILENT, 1.0), (0, Weight.OWN, 2.0)], 0),
        ([(1, Weight.OWN, 1.0), (0, Weight.OWN, 0.9)], 0),
        ([(1, Weight.CONSEQUENCE, 1.0)], 1),
    ],
)
def test_the_cause_is_what_follows_from_nothing_else(findings: list[tuple[int, Weight, float]], culprit: int) -> None:
    assert cause_of(Finding(rank, weight, "", at_s) for rank, weight, at_s in findings).rank == culprit


def test_how_a_process_ended() -> None:
    assert [exit_words(code) for code in (3, -9, -64)] == ["exited with status 3", "was killed by SIGKILL", "was killed by SIGRTMAX"]
    assert exit_words(-99) == "was killed by signal 99"


def orders(**changes: object) -> BlockOrders:
    values: dict[str, object] = {
        "model": "chain", "revision": "r", "group": "g", "epoch": 3, "owner": "n", "first_rank": 2, "num_ranks": 2, "pipeline": 2,
        "tensor": 2,
        "is_spread": True, "secret": "0" * 64, "verify": True, "heartbeat_s": 0.1, "hung_after_s": 1.0, "grace_s": 1.0, **changes,
    }
    return BlockOrders(**values)  # type: ignore[arg-type]


def test_every_rank_of_a_block_gets_its_own_launch(tmp_path: Path) -> None:
    directory = load_directory(chain(tmp_path, "{pipeline: 2, tensor: 2, nodes: 2}"))
    settings = NodeSettings(rank_interface="eth9")
    (first, one), (second, two) = launches(orders(), directory, settings, "n2", (("cuda:3",), ("cuda:5",)))
    assert [(launch.rank, launch.local_rank, launch.world_size, launch.local_world_size) for launch in (first, second)] == [
        (2, 0, 4, 2), (3, 1, 4, 2),
    ]
    assert (first.interface, first.device, first.num_devices, first.verify, first.node) == ("eth9", "cuda:0", 1, True, "n2")
    assert [one["CUDA_VISIBLE_DEVICES"], two["CUDA_VISIBLE_DEVICES"]] == ["3,5", "5,3"]
    assert {one[name] for name in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")} == {"eth9"}
    assert [one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]] == ["2", "0", "4", "2"]


def test_a_group_on_one_node_stays_on_loopback_and_a_custom_one_sees_its_devices(tmp_path: Path) -> None:
    directory = load_directory(chain(tmp_path, "{custom: 2}"))
    alone = orders(is_spread=False, first_rank=0, num_ranks=1, pipeline=1, tensor=1)
    ((launch, environment),) = launches(alone, directory, NodeSettings(rank_interface="eth9"), "n", (("cuda:1", "cuda:2"),))
    assert (launch.interface, launch.num_devices, environment["CUDA_VISIBLE_DEVICES"]) == ("lo", 2, "1,2")
    ((launch, environment),) = launches(alone, directory, NodeSettings(), "n", (("cpu",),))
    assert (launch.device, launch.num_devices, "CUDA_VISIBLE_DEVICES" in environment) == ("cpu", 0, False)


@pytest.mark.parametrize(
    ("parallel", "settings", "words"),
    [
        ("{pipeline: 2, nodes: 2}", {}, "takes no part in groups over several nodes; set rank_interface"),
        ("{pipeline: 2}", {"rank_interface": "nope0"}, "has no network interface 'nope0'; it has: "),
    ],
)
def test_a_node_refuses_to_offer_what_it_can_never_form(tmp_path: Path, parallel: str, settings: dict[str, str], words: str) -> None:
    chain(tmp_path, parallel)
    with pytest.raises(FailedPrecondition) as refused:
        offered_directories(NodeSettings(models_dir=str(tmp_path), **settings))  # type: ignore[arg-type]
    assert words in str(refused.value)


def test_a_cut_model_is_offered(tmp_path: Path) -> None:
    chain(tmp_path, "{pipeline: 2, tensor: 2, nodes: 2}")
    (directory,) = offered_directories(NodeSettings(models_dir=str(tmp_path), rank_interface="lo"))
    assert directory.yaml.parallel.world_size == 4
