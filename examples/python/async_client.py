"""Sends many requests at once with the asyncio client, and shows how the mesh joined them into batches.

Start a mesh that serves `minilm` first (`tensorway up models --model minilm`), then:

    python examples/python/async_client.py --requests 200 --in-flight 32
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Iterator

from tensorway import AsyncClient
from tensorway.errors import TensorwayError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--endpoint", default="localhost:8001", help="the gateway, host:port")
    parser.add_argument("--requests", type=int, default=200, help="requests in all")
    parser.add_argument("--in-flight", type=int, default=32, help="requests at once")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="deadline of each request, seconds")
    return parser.parse_args()


async def send_all(client: AsyncClient, numbers: Iterator[int], batch_rows: Counter[int]) -> None:
    """Takes numbers and sends a sentence for each, one after another; counts the batch that each request was part of."""
    for number in numbers:
        result = await client.infer("minilm", {"text": [f"This is sentence number {number}."]})
        batch_rows[result.timing.batch_rows] += 1


async def main() -> None:
    """`--in-flight` senders share one client, one connection and one supply of work."""
    arguments = parse_arguments()
    numbers = iter(range(arguments.requests))
    batch_rows: Counter[int] = Counter()
    async with AsyncClient(arguments.endpoint, timeout_s=arguments.timeout_s) as client:
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(arguments.in_flight):
                tasks.create_task(send_all(client, numbers, batch_rows))
        took_s = time.monotonic() - began_s
    print(f"{arguments.requests} requests in {took_s:.2f} s")
    for rows, num_requests in sorted(batch_rows.items()):
        print(f"{num_requests:5} requests ran in a batch of {rows} rows")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except* TensorwayError as group:
        first = group.exceptions[0]
        raise SystemExit(str(first)) from None
