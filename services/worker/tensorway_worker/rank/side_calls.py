"""What a leader asks of the other ranks beside steps: levels of logs, profiles. Small, rare, and in no order with the steps.

A call is a name with arguments, and its reply a text with tensors. It comes in a thread of RPC, which must not be held: what takes long is
begun there and answered later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from tensorway.errors import FailedPrecondition
from tensorway_worker.rank import rpc
from tensorway_worker.rank.commands import SIDE, Command
from tensorway_worker.rank.group_port import GroupLost, first_line

#: Text and bytes.
Told = tuple[str, bytes]
#: Answers one kind of call, from its arguments.
Answerer = Callable[[Mapping[str, Any]], Future[Told]]


class SideCalls:
    """Of one rank: what it answers, and what it asks of others."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._answerers: dict[str, Answerer] = {}

    def add(self, name: str, answerer: Answerer) -> None:
        """From here on calls of that name are answered."""
        self._answerers[name] = answerer

    def answer(self, detail: Mapping[str, Any]) -> rpc.Reply:
        """In a thread of RPC."""
        answerer = self._answerers.get(detail["call"])
        if answerer is None:
            raise FailedPrecondition(f"this rank does not answer {detail['call']!r} yet")
        reply = rpc.new_reply()
        answerer(detail).add_done_callback(partial(_pass_on, reply))
        return reply

    def ask(self, rank: int, name: str, arguments: Mapping[str, Any]) -> asyncio.Future[Told]:
        """The leader's, in the loop: calls another rank. The future raises GroupLost where it is gone or refuses."""
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Told] = loop.create_future()
        command = Command(SIDE, 0, (), {"call": name, **arguments})

        def replied(reply: rpc.Reply) -> None:
            loop.call_soon_threadsafe(_resolve, told, rank, reply)

        rpc.call(rank, command.to_head(self._epoch), ()).add_done_callback(replied)
        return told


def _pass_on(reply: rpc.Reply, future: Future[Told]) -> None:
    error = future.exception()
    if error is not None:
        reply.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))  # type: ignore[arg-type]  # its stub says otherwise
        return
    text, content = future.result()
    # The head of a reply that is empty says nothing at all.
    reply.set_result((text, [torch.frombuffer(bytearray(content), dtype=torch.uint8)] if content else []))


def _resolve(told: asyncio.Future[Told], rank: int, reply: rpc.Reply) -> None:
    """In the loop."""
    if told.done():
        return
    try:
        text, tensors = reply.value()
    except RuntimeError as error:
        told.set_exception(GroupLost(f"rank {rank} did not answer: {first_line(error)}"))
    else:
        told.set_result((text, tensors[0].numpy().tobytes() if tensors else b""))


def told(text: str = "", content: bytes = b"") -> Future[Told]:
    """An answer that is there already."""
    future: Future[Told] = Future()
    future.set_result((text, content))
    return future
