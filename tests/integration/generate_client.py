"""A client that can be killed: `python generate_client.py ENDPOINT MODEL COUNT TOKENS` opens so many streams of so many tokens, prints a
line once each has one, and reads on until it is ended."""

from __future__ import annotations

import asyncio
import sys

from tensorway import AsyncClient, Delta


async def main(endpoint: str, model: str, count: int, num_tokens: int) -> None:
    num_begun = 0

    async def read(client: AsyncClient, number: int) -> None:
        nonlocal num_begun
        has_begun = False
        async for event in client.generate(model, [3 + number, 4, 5], max_tokens=num_tokens, ignore_eos=True, timeout_s=600):
            if isinstance(event, Delta) and not has_begun:
                has_begun = True
                num_begun += 1
                if num_begun == count:
                    print("all begun", flush=True)

    async with AsyncClient(endpoint) as client, asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(read(client, number))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
