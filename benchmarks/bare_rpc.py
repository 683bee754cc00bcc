"""What PyTorch RPC alone costs: a Python function that returns its tensor, transports uv, channels cma and basic.

`python -m benchmarks.bare_rpc STORE RANK SECONDS SIZE...`; rank 0 prints size -> p50 seconds as JSON.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from torch.distributed import rpc

from benchmarks.group_rank import p50_s


def echo(tensor: torch.Tensor) -> torch.Tensor:
    """Comes back as it went."""
    return tensor


def main() -> None:
    store, rank, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{store}", _transports=["uv"], _channels=["cma", "basic"])
    rpc.init_rpc(f"rank-{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        found: dict[str, float] = {}
        for size in map(int, sys.argv[4:]):
            tensor = torch.zeros(1, size // 4)
            found[str(size)] = p50_s(lambda tensor=tensor: rpc.rpc_sync("rank-1", echo, (tensor,)), seconds)
        print(json.dumps(found), flush=True)
    rpc.shutdown()


if __name__ == "__main__":
    main()
