"""A process that is no rank but reaches a rank's RPC port: `python stranger.py PORT FILE`.

Tries to have the rank make FILE, and stays connected.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch._C._distributed_rpc as c_rpc
from torch.distributed import HashStore, rpc
from torch.distributed import autograd as dist_autograd
from torch.distributed.rpc import api


def main() -> None:
    port, mark = int(sys.argv[1]), sys.argv[2]
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    store = HashStore()
    store.set("names/0", "rank-0")
    store.set("addrs/rank-0", f"uv://127.0.0.1:{port}")
    options = rpc.TensorPipeRpcBackendOptions(rpc_timeout=5, init_method="none", _transports=["uv"], _channels=["cma", "basic"])
    dist_autograd._init(1)
    api._init_rpc_states(c_rpc.TensorPipeAgent(store, "stranger", 1, 2, options, {}, []))
    try:
        print("answered", rpc.rpc_sync("rank-0", os.mkdir, (mark,)), flush=True)
    except Exception as error:  # noqa: BLE001 - shown to the test
        print("refused", type(error).__name__, flush=True)
    # A call without Python shows that it was the rank's own decision, and keeps the connection.
    print("builtin", rpc.rpc_sync("rank-0", torch.add, (torch.ones(1), 1)).item(), flush=True)
    time.sleep(30)


if __name__ == "__main__":
    main()
