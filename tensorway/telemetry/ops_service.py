"""`tensorway.v1.OpsService`: what an operator asks of one process. Every service and every group's leader answers it."""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest
from tensorway.telemetry.logs import LEVELS, LogLevel
from tensorway.transport.port import Call, Server
from tensorway.v1 import ops_pb2

SERVICE: Final = "tensorway.v1.OpsService"
GET_LOG_LEVEL: Final = f"/{SERVICE}/GetLogLevel"
SET_LOG_LEVEL: Final = f"/{SERVICE}/SetLogLevel"
PROFILE_GROUP: Final = f"/{SERVICE}/ProfileGroup"
#: Longest that a level may be set for, seconds: a week.
MAX_LEVEL_S: Final = 7 * 86400.0


class OpsServicer:
    """Answers GetLogLevel and SetLogLevel; leaders add ProfileGroup."""

    def __init__(self, log_level: LogLevel) -> None:
        self._log_level = log_level

    def attach(self, server: Server) -> None:
        server.add_unary(GET_LOG_LEVEL, self.get_log_level)
        server.add_unary(SET_LOG_LEVEL, self.set_log_level)

    async def get_log_level(self, message: bytes, call: Call) -> bytes:
        try:
            ops_pb2.GetLogLevelRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no GetLogLevelRequest", field="request") from error
        log_level = self._log_level
        return ops_pb2.GetLogLevelResponse(
            level=log_level.level, next_level=log_level.next_level, next_in_seconds=log_level.next_in_s
        ).SerializeToString()

    async def set_log_level(self, message: bytes, call: Call) -> bytes:
        try:
            request = ops_pb2.SetLogLevelRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no SetLogLevelRequest", field="request") from error
        check_level(request.level, request.seconds)
        return ops_pb2.SetLogLevelResponse(previous=self._log_level.change(request.level, request.seconds)).SerializeToString()


def check_level(level: str, seconds: float) -> None:
    """Raises InvalidRequest for what is no level, or no time to keep one."""
    if level not in LEVELS:
        raise InvalidRequest(f"level: {level[:32]!r} is none of {', '.join(LEVELS)}", field="level")
    if not 0.0 <= seconds <= MAX_LEVEL_S:
        raise InvalidRequest(f"seconds: {seconds} is outside 0 to {MAX_LEVEL_S:g}; 0 keeps the level", field="seconds")
