"""gRPC server reflection (v1 and v1alpha) over the Server port, from the default descriptor pool.

The two versions have the same messages under two method names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha.reflection_pb2 import (
    ErrorResponse,
    ExtensionNumberResponse,
    FileDescriptorResponse,
    ListServiceResponse,
    ServerReflectionRequest,
    ServerReflectionResponse,
    ServiceResponse,
)

from tensorway.errors import InvalidRequest, Status
from tensorway.transport.port import Server, Stream

_VERSIONS: Final = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


def add_reflection(server: Server, service_names: Iterable[str]) -> None:
    """Lets clients such as grpcurl list and describe `service_names` (full names, whose stubs this process has imported)."""
    reflection = _Reflection((*service_names, _VERSIONS[1]))
    for name in _VERSIONS:
        server.add_stream(f"/{name}/ServerReflectionInfo", reflection.serve)


class _Reflection:
    def __init__(self, service_names: Iterable[str]) -> None:
        self._service_names = tuple(sorted(set(service_names)))
        self._pool = Default()

    async def serve(self, stream: Stream) -> None:
        """Answers one question after another."""
        while (message := await stream.read()) is not None:
            try:
                request = ServerReflectionRequest.FromString(message)
            except DecodeError as error:
                raise InvalidRequest(f"not a ServerReflectionRequest: {error}") from error
            response = self._answer(request)
            response.valid_host = request.host
            response.original_request.CopyFrom(request)
            await stream.write(response.SerializeToString())

    def _answer(self, request: ServerReflectionRequest) -> ServerReflectionResponse:
        kind = request.WhichOneof("message_request")
        try:
            if kind == "list_services":
                return self._services()
            if kind == "file_by_filename":
                return _files(self._pool.FindFileByName(request.file_by_filename))
            if kind == "file_containing_symbol":
                return _files(self._file_of(request.file_containing_symbol))
            if kind == "file_containing_extension":
                wanted = request.file_containing_extension
                message = self._pool.FindMessageTypeByName(wanted.containing_type)
                extension: Any = self._pool.FindExtensionByNumber(message, wanted.extension_number)
                return _files(extension.file)
            if kind == "all_extension_numbers_of_type":
                return self._extensions(request.all_extension_numbers_of_type)
        except KeyError as error:
            return _error(Status.NOT_FOUND, str(error).strip("'\""))
        return _error(Status.INVALID_ARGUMENT, "the request asks for nothing")

    def _file_of(self, symbol: str) -> FileDescriptor:
        """The file that declares `symbol`. Raises KeyError where none does."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            # The pool does not count a method among its symbols.
            method: Any = self._pool.FindMethodByName(symbol)
            file: FileDescriptor = method.containing_service.file
            return file

    def _services(self) -> ServerReflectionResponse:
        services = [ServiceResponse(name=name) for name in self._service_names]
        return ServerReflectionResponse(list_services_response=ListServiceResponse(service=services))

    def _extensions(self, type_name: str) -> ServerReflectionResponse:
        message = self._pool.FindMessageTypeByName(type_name)
        numbers = sorted(extension.number for extension in self._pool.FindAllExtensions(message))
        answer = ExtensionNumberResponse(base_type_name=message.full_name, extension_number=numbers)
        return ServerReflectionResponse(all_extension_numbers_response=answer)


def _files(file: FileDescriptor) -> ServerReflectionResponse:
    """`file` and everything it imports, once each."""
    found: dict[str, bytes] = {}
    waiting = [file]
    while waiting:
        descriptor = waiting.pop()
        if descriptor.name not in found:
            found[descriptor.name] = descriptor.serialized_pb
            waiting.extend(descriptor.dependencies)
    return ServerReflectionResponse(file_descriptor_response=FileDescriptorResponse(file_descriptor_proto=list(found.values())))


def _error(code: Status, sentence: str) -> ServerReflectionResponse:
    return ServerReflectionResponse(error_response=ErrorResponse(error_code=int(code), error_message=sentence))
