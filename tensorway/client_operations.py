"""What operators ask of a mesh through a client: profiles of groups, and the log levels of members."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tensorway.errors import InvalidRequest
from tensorway.v1 import mesh_pb2, ops_pb2

if TYPE_CHECKING:
    from tensorway.client_rota import AsyncChannels, BlockingChannels

SET_LEVEL: Final = "/tensorway.v1.MeshService/SetMemberLogLevel"
_PROFILE: Final = "/tensorway.v1.MeshService/Profile"
#: Beyond what is recorded: beginning, gathering, and putting together.
_MORE_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class ProfileWish:
    """What to record of a live group: of a model, or the one that is named."""

    model: str = ""
    group: str = ""
    num_steps: int = 20
    #: Most seconds to wait for the steps; what there is by then is the answer.
    max_s: float = 30.0
    with_shapes: bool = False
    with_memory: bool = False
    with_stacks: bool = False

    def to_message(self) -> bytes:
        """A serialised ProfileRequest. Raises InvalidRequest for numbers that it cannot hold."""
        try:
            options = ops_pb2.ProfileOptions(
                num_steps=self.num_steps, max_seconds=self.max_s, with_shapes=self.with_shapes, with_memory=self.with_memory,
                with_stacks=self.with_stacks,
            )
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"options: {error}", field="options") from error
        return mesh_pb2.ProfileRequest(model=self.model, group=self.group, options=options).SerializeToString()


@dataclass(frozen=True, slots=True)
class ProfileProgress:
    """How far a profile has come; see `tensorway.v1.ProfileProgress`."""

    group: str
    num_steps: int
    num_wanted: int
    #: recording, gathering, or done.
    state: str


@dataclass(frozen=True, slots=True)
class LevelChange:
    """What became of one member's log level."""

    kind: str
    id: str
    #: The level before; empty where it could not be changed.
    previous: str
    #: Why it could not be changed.
    error: str


def profile(channels: BlockingChannels, wish: ProfileWish) -> Generator[ProfileProgress | bytes]:
    """Progress, and then the pieces of the file. Closing it ends the profile. Raises what the mesh raises."""
    stream = channels.server_stream(_PROFILE, wish.to_message(), wish.max_s + _MORE_S)
    try:
        while (message := stream.read()) is not None:
            yield _read(message)
    finally:
        stream.cancel()


async def profile_async(channels: AsyncChannels, wish: ProfileWish) -> AsyncGenerator[ProfileProgress | bytes]:
    """`profile` for asyncio."""
    stream = channels.server_stream(_PROFILE, wish.to_message(), wish.max_s + _MORE_S)
    try:
        while (message := await stream.read()) is not None:
            yield _read(message)
    finally:
        await stream.cancel()


def level_request(level: str, members: Sequence[str], seconds: float) -> bytes:
    """A serialised SetMemberLogLevelRequest."""
    return mesh_pb2.SetMemberLogLevelRequest(level=level, members=members, seconds=seconds).SerializeToString()


def read_levels(message: bytes) -> tuple[LevelChange, ...]:
    """What became of each member."""
    members = mesh_pb2.SetMemberLogLevelResponse.FromString(message).members
    return tuple(LevelChange(member.kind, member.id, member.previous, member.error) for member in members)


def _read(message: bytes) -> ProfileProgress | bytes:
    response = mesh_pb2.ProfileResponse.FromString(message)
    if response.WhichOneof("event") == "data":
        return response.data
    progress = response.progress
    return ProfileProgress(progress.group, progress.num_steps, progress.num_wanted, progress.state)
