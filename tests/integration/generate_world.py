"""Streams of tokens through a real mesh: small models that generate, calls read message by message, and groups found and killed."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tensorway.errors import TensorwayError
from tensorway.registry.port import GROUP, NODE, Registration
from tensorway.transport.channel import AsyncChannel, ReplyStream
from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import node_pb2
from tests.integration.conftest import ROOT, Mesh
from tests.integration.test_faults import wait_gone

GENERATE = "/tensorway.v1.InferenceService/Generate"
LIST_GROUPS = "/tensorway.v1.NodeService/ListGroups"
#: Longer than any group needs to be formed anew on a busy machine.
PATIENCE_S = 120.0
#: Tokens of a prompt that fill a block of what the orchestrator remembers of groups, so that it leads to the group that has it.
PROMPT = tuple(3 + number * 7 % 90 for number in range(70))
#: So many layers make a step of the small models take ten milliseconds and more: an answer can be hurt on its way.
NUM_LAYERS = 64


@cache
def small_models() -> ModuleType:
    """The module that makes small model directories, which lies among the worker's own tests."""
    path = ROOT / "tests" / "unit" / "worker" / "generating.py"
    spec = importlib.util.spec_from_file_location("generating", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(
    models: Path, name: str, pipeline: int = 1, tensor: int = 1, *, num_layers: int = NUM_LAYERS, longest: int = 256, **more: Any
) -> str:
    """Adds a Llama of random weights to `models`, cut like this, and returns its name. All with as many layers are the same model.

    `longest`: tokens of a prompt and its answer; `more`: further keys of model.yaml.
    """
    config = {**small_models().SIZES, "num_hidden_layers": num_layers, "max_position_embeddings": longest}
    parallel = {"pipeline": pipeline, "tensor": tensor, "verify": "off"}
    generation = {"kv_cache_mb": 8, **more.pop("generation", {})}
    small_models().made(models / name, config=config, parallel=parallel, threads=1, generation=generation, **{"name": name, **more})
    return name


def ask(model: str, prompt: Sequence[int] | str = PROMPT, max_tokens: int = 40, **more: Any) -> pb.GenerateRequest:
    """A request for so many tokens, end-of-sequence tokens included. `more`: fields of the request, of Sampling and of Stop."""
    request = pb.GenerateRequest(model=model)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    request.stop.max_tokens, request.stop.ignore_eos = max_tokens, True
    for name, value in more.items():
        holder = next(one for one in (request, request.sampling, request.stop) if name in one.DESCRIPTOR.fields_by_name)
        if isinstance(value, list | tuple):
            getattr(holder, name).extend(value)
        else:
            setattr(holder, name, value)
    return request


def resume(told: Told) -> pb.GenerateRequest:
    """Asks for what follows what was told."""
    position = pb.Resume(stream_id=told.started.stream_id, next_sequence=told.messages[-1].sequence + 1)
    return pb.GenerateRequest(resume=position)


@dataclass
class Told:
    """The messages of one stream."""

    messages: list[pb.GenerateResponse] = field(default_factory=list)

    @property
    def started(self) -> pb.Started:
        (first,) = [message for message in self.messages if message.WhichOneof("event") == "started"]
        return first.started

    def deltas(self, choice: int = 0) -> list[pb.Delta]:
        """Of the answer itself."""
        deltas = [message.delta for message in self.messages if message.WhichOneof("event") == "delta"]
        return [delta for delta in deltas if delta.choice == choice and not delta.is_prompt]

    def ids(self, choice: int = 0) -> list[int]:
        """The tokens, after checking that no delta overlaps or leaves out another."""
        ids: list[int] = []
        for delta in self.deltas(choice):
            assert delta.offset == len(ids), self.messages
            ids += delta.token_ids
        return ids

    def text(self, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas(choice))

    def finished(self, choice: int = 0) -> pb.Finished:
        ends = [message.finished for message in self.messages if message.WhichOneof("event") == "finished"]
        (end,) = [end for end in ends if end.choice == choice]
        return end

    def is_same(self, other: Told, num_choices: int = 1) -> None:
        """Fails unless both told the same answers, each in an unbroken sequence of messages."""
        for told in (self, other):
            assert [message.sequence for message in told.messages] == list(range(len(told.messages)))
            assert told.messages[0].WhichOneof("event") == "started"
        for choice in range(num_choices):
            assert self.ids(choice) == other.ids(choice)
            assert self.text(choice) == other.text(choice)
            mine, theirs = self.finished(choice), other.finished(choice)
            assert (mine.reason, mine.stop_match) == (theirs.reason, theirs.stop_match)
            assert mine.usage.num_completion_tokens == theirs.usage.num_completion_tokens


class Call:
    """One call of Generate, read message by message. Use as an async context manager: leaving it cancels what is left."""

    def __init__(self, stream: ReplyStream, told: Told | None = None) -> None:
        self._stream = stream
        self.told = told or Told()

    async def __aenter__(self) -> Call:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel()

    async def next(self) -> pb.GenerateResponse | None:
        """The next message; None at the end of the stream."""
        message = await self._stream.read()
        if message is None:
            return None
        self.told.messages.append(pb.GenerateResponse.FromString(message))
        return self.told.messages[-1]

    async def tokens(self, count: int, choice: int = 0) -> None:
        """Returns once `started` and that many tokens have come."""
        while not self.told.messages or len(self.told.ids(choice)) < count:
            assert await self.next() is not None, self.told.messages

    async def rest(self) -> Told:
        """All there is, after reading the rest of it."""
        while await self.next() is not None:
            pass
        return self.told

    async def cancel(self) -> None:
        await self._stream.cancel()


@dataclass
class Talk:
    """A mesh whose models generate, and a channel to each of its members that was called."""

    mesh: Mesh
    channels: dict[str, AsyncChannel] = field(default_factory=dict)

    def channel(self, endpoint: str = "") -> AsyncChannel:
        """To the first gateway, or to another member."""
        endpoint = endpoint or self.mesh.endpoint
        return self.channels.setdefault(endpoint, AsyncChannel(endpoint))

    def call(self, request: pb.GenerateRequest, endpoint: str = "", told: Told | None = None, timeout_s: float = PATIENCE_S) -> Call:
        """Begins a call; `told`: what an earlier one has told of the same stream."""
        return Call(self.channel(endpoint).server_stream(GENERATE, request.SerializeToString(), timeout_s), told)

    async def answer(self, request: pb.GenerateRequest, endpoint: str = "", told: Told | None = None) -> Told:
        """All that is told to a request."""
        async with self.call(request, endpoint, told) as call:
            return await call.rest()

    async def cut(self, endpoint: str) -> None:
        """Closes the connection to a member, with all calls on it."""
        await self.channels.pop(endpoint).close()

    async def groups(self, model: str) -> list[node_pb2.Group]:
        """A model's groups, as their nodes report them."""
        found: list[node_pb2.Group] = []
        for node in await self.mesh.members(NODE):
            reply = await self.channel(node.endpoint).unary(LIST_GROUPS, b"", PATIENCE_S)
            found += [group for group in node_pb2.ListGroupsResponse.FromString(reply.response).groups if group.model == model]
        return found

    async def until_group(self, model: str, is_so: Callable[[node_pb2.Group], bool]) -> node_pb2.Group:
        """The first report of one of a model's groups of which that holds; asks a few times a second."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for group in await self.groups(model):
                    if is_so(group):
                        return group
                await asyncio.sleep(0.05)

    async def registered(self, is_so: Callable[[Mapping[str, Registration]], bool]) -> Mapping[str, Registration]:
        """The registered groups by id, once that holds of them."""
        async with asyncio.timeout(PATIENCE_S), aclosing(self.mesh.registry.watch(GROUP)) as watched:
            async for rows in watched:
                found = {row.id: row for row in rows}
                if is_so(found):
                    return found
        raise AssertionError("a watch never ends")

    async def serving(self, model: str, count: int) -> list[Registration]:
        """The model's groups, once so many serve."""
        rows = await self.registered(lambda found: len(_of(model, found)) >= count)
        return _of(model, rows)

    async def kill_leader(self, group: str) -> None:
        """Kills the leader of a group that is named as in `Finished.group`, if that epoch of it still lives."""
        name, _, epoch = group.partition("#")
        for row in await self.mesh.leaders():
            if (row.id, row.metadata["epoch"]) == (name, epoch):
                os.kill(int(row.metadata["pid"]), signal.SIGKILL)
                await wait_gone(int(row.metadata["pid"]))

    async def measure(self, kind: str, name: str, model: str = "") -> dict[str, float]:
        """A measurement of every member of a kind, by its id: of one model, or of none."""
        label = f'{{model="{model}"}}' if model else ""
        pattern = re.compile(rf"^{re.escape(name + label)} (\S+)$", re.MULTILINE)
        found: dict[str, float] = {}
        for member in await self.mesh.members(kind):
            text = await asyncio.to_thread(_read, f"http://{member.metadata['ops']}/metrics")
            value = pattern.search(text)
            found[member.id] = 0.0 if value is None else float(value.group(1))
        return found


def _of(model: str, rows: Mapping[str, Registration]) -> list[Registration]:
    return [row for row in rows.values() if row.metadata["model"] == model]


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


async def error_of(call: Call) -> TensorwayError | None:
    """What ends a call; None where it ends well."""
    try:
        await call.rest()
    except TensorwayError as error:
        return error
    return None


@asynccontextmanager
async def talk_of(mesh: Mesh) -> AsyncIterator[Talk]:
    talk = Talk(mesh)
    try:
        yield talk
    finally:
        for channel in talk.channels.values():
            await channel.close()
