"""A rank that only meets others: real PyTorch RPC and gloo over a NodeStore. `launch.model` names what it does."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import rpc

from tensorway_worker.rank.launch import RankLaunch
from tensorway_worker.rank.node_pipe import read_launch, watch_node
from tensorway_worker.rank.node_store import NodeStore


def say(*words: object) -> None:
    print(*words, flush=True)


def meet(launch: RankLaunch, store: NodeStore) -> None:
    """RPC to the next rank, a sum over all."""

    def rendezvous(url: str, **_: object) -> Iterator[tuple[distributed.Store, int, int]]:
        yield store, launch.rank, launch.world_size

    distributed.register_rendezvous_handler("tensorway", rendezvous)
    options = rpc.TensorPipeRpcBackendOptions(init_method="tensorway://", _transports=["uv"], _channels=["basic"])
    rpc.init_rpc(f"rank-{launch.rank}", rank=launch.rank, world_size=launch.world_size, rpc_backend_options=options)
    following = f"rank-{(launch.rank + 1) % launch.world_size}"
    say("rpc", rpc.rpc_sync(following, torch.add, (torch.ones(1), launch.rank)).item())
    prefix = distributed.PrefixStore("gloo", store)
    distributed.init_process_group("gloo", store=prefix, rank=launch.rank, world_size=launch.world_size)
    total = torch.tensor([float(launch.rank)])
    distributed.all_reduce(total)
    say("sum", total.item())
    distributed.barrier()


def operate(_: RankLaunch, store: NodeStore) -> None:
    """Every operation, through torch's own trampoline as well as directly."""
    prefix = distributed.PrefixStore("p", store)
    prefix.set("a", "1")
    prefix.multi_set(["b", "c"], ["2", "\x00\n3"])
    prefix.append("a", "1")
    prefix.wait(["a", "b"], timedelta(seconds=1))
    assert prefix.multi_get(["a", "b", "c"]) == [b"11", b"2", b"\x00\n3"]
    assert store.get("p/a") == b"11"
    assert [prefix.add("n", 2), prefix.add("n", -5)] == [2, -3]
    assert [prefix.check(["a", "n"]), prefix.check(["a", "z"])] == [True, False]
    assert [prefix.compare_set("a", "no", "x"), prefix.compare_set("a", "11", "x")] == [b"11", b"x"]
    assert [prefix.compare_set("new", "no", "x"), prefix.compare_set("new", "", "y")] == [b"no", b"y"]
    assert [prefix.delete_key("a"), prefix.delete_key("a")] == [True, False]
    assert prefix.num_keys() == 4
    large = bytes(1_000_000)
    store.set("large", large)
    assert store.get("large") == large
    say("all operations are right")
    store.set_timeout(timedelta(seconds=0.2))
    for call in (lambda: store.wait(["a", "b"]), lambda: prefix.get("never"), lambda: store.set("huge", bytes(5_000_000))):
        try:
            call()
        except distributed.DistStoreError as error:
            say("refused:", error)


def hang(_: RankLaunch, store: NodeStore) -> None:
    """Waits for what never comes."""
    store.set_timeout(timedelta(seconds=60))
    say("waiting")
    try:
        store.get("never")
    except distributed.DistStoreError as error:
        say("ended:", error)


def crowd(launch: RankLaunch, store: NodeStore) -> None:
    """Many threads at once, each with its own keys."""

    def work(name: str) -> None:
        for number in range(50):
            store.set(f"{name}/{number}", f"{name}{number}")
            assert store.get(f"{name}/{number}") == f"{name}{number}".encode()
            store.add("count", 1)

    threads = [threading.Thread(target=work, args=(f"{launch.rank}-{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say("count", store.add("count", 0))


PROGRAMS: dict[str, Callable[[RankLaunch, NodeStore], None]] = {"meet": meet, "operate": operate, "hang": hang, "crowd": crowd}


async def main() -> None:
    """The loop reads answers while the program runs in a thread, as in a real rank."""
    launch = read_launch(sys.stdin.fileno())
    store = NodeStore(os.environ, 20.0)
    watch_node(asyncio.get_running_loop(), sys.stdin.fileno(), lambda: store.close("the node has gone"), store.take_line)
    await asyncio.to_thread(PROGRAMS[launch.model], launch, store)
    say("done")


if __name__ == "__main__":
    for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ[variable] = "lo"
    asyncio.run(main())
    sys.stdout.flush()
    os._exit(0)
