"""Messages for the door: valid ones, wounded ones, and forged ones that always parse."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import prod

from tensorway.compat import grpc_service_pb2
from tensorway.tensors import ITEM_SIZE, DataType, encode_bytes
from tensorway.v1 import inference_pb2, tensor_pb2
from tests.contract.gateway.scripted import SPECS
from tests.contract.gateway.streaming import TALKER

NATIVE = "/tensorway.v1.InferenceService/Infer"
OIP = "/inference.GRPCInferenceService/ModelInfer"
GENERATE = "/tensorway.v1.InferenceService/Generate"
OIP_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
#: The models behind the door: the ordinary ones, and one that generates.
DOOR_SPECS = (*SPECS, TALKER)


def _raw(dtype: DataType, shape: Sequence[int]) -> bytes:
    count = prod(shape)
    return encode_bytes([b"word"] * count) if dtype is DataType.BYTES else bytes([1]) * (count * ITEM_SIZE[dtype])


def _valid_messages() -> dict[str, list[bytes]]:
    """Valid requests of every model in both dialects, raw and typed."""
    native: list[bytes] = []
    second: list[bytes] = []
    request = grpc_service_pb2.ModelInferRequest
    for item in SPECS:
        shapes = [tuple(2 if isinstance(extent, str) else extent for extent in tensor.shape) for tensor in item.signature.inputs]
        pairs = list(zip(item.signature.inputs, shapes, strict=True))
        message = inference_pb2.InferRequest(
            model=item.model, request_id="id", priority=3, output_names=[tensor.name for tensor in item.signature.outputs],
            inputs=[
                tensor_pb2.Tensor(name=tensor.name, dtype=int(tensor.dtype), shape=shape, data=_raw(tensor.dtype, shape))
                for tensor, shape in pairs
            ],
        )
        message.parameters["temperature"].double_value = 0.5
        native.append(message.SerializeToString())
        raw = request(
            model_name=item.model, id="id", outputs=[request.InferRequestedOutputTensor(name=item.signature.outputs[0].name)],
            inputs=[request.InferInputTensor(name=tensor.name, datatype=tensor.dtype.name, shape=shape) for tensor, shape in pairs],
            raw_input_contents=[_raw(tensor.dtype, shape) for tensor, shape in pairs],
        )
        raw.parameters["timeout"].int64_param = 5_000_000
        raw.parameters["priority"].uint64_param = 2
        second.append(raw.SerializeToString())
    typed = request(model_name="mixed", model_version="1")
    typed.inputs.add(name="a", datatype="INT64", shape=[2, 2]).contents.int64_contents.extend([1, -2, 3, 4])
    typed.inputs.add(name="b", datatype="INT8", shape=[2]).contents.int_contents.extend([-128, 127])
    typed.inputs.add(name="flag", datatype="BOOL").contents.bool_contents.append(True)
    words = request(model_name="words")
    words.inputs.add(name="text", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"ab", b""])
    second += [typed.SerializeToString(), words.SerializeToString()]
    return {NATIVE: native, OIP: second, GENERATE: _valid_generations(), OIP_STREAM: [*second, *_valid_pieces()]}


def _valid_generations() -> list[bytes]:
    generate = inference_pb2.GenerateRequest
    messages = [inference_pb2.ChatMessage(role="system", content="be brief"), inference_pb2.ChatMessage(role="user", content="hi")]
    sampling = inference_pb2.Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=3)
    stop = inference_pb2.Stop(max_tokens=9, min_tokens=2, strings=["END", "\n\n"], token_ids=[1, 2], ignore_eos=True)
    return [
        item.SerializeToString()
        for item in (
            generate(model="talker", text="Once upon a time", sampling=sampling, stop=stop, priority=3, num_choices=2, echo=True),
            generate(model="talker", token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]), num_top_logprobs=3, request_id="id"),
            generate(model="talker", chat=inference_pb2.Chat(messages=messages), revision=TALKER.revision[:8]),
            generate(resume=inference_pb2.Resume(stream_id="stream-1", next_sequence=4), request_id="id"),
        )
    ]


def _valid_pieces() -> list[bytes]:
    request = grpc_service_pb2.ModelInferRequest(model_name="talker", id="id", raw_input_contents=[encode_bytes([b"hello"])])
    request.inputs.add(name="text", datatype="BYTES", shape=[1])
    request.parameters["temperature"].double_param = 0.5
    request.parameters["max_tokens"].int64_param = 3
    typed = grpc_service_pb2.ModelInferRequest(model_name="talker")
    typed.inputs.add(name="text", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"hello")
    return [request.SerializeToString(), typed.SerializeToString()]


def mutate(message: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """One to four random wounds."""
    found = bytearray(message)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(7)
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.randint(1, 8))
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del found[at:end]
        elif kind == 3:
            found[at:at] = found[at:end]
        elif kind == 4:
            found[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 5:
            found[at:] = rng.choice(others)[at:]
        else:
            found[at:end] = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    return bytes(found)


_EXTENTS = (0, 1, 2, 2, 2, 3, 4, 8, 9, -1, 2**31, 2**62, -(2**63))


def forge(method: str, rng: random.Random) -> bytes:
    """A message that always parses: right and wrong names, types, shapes and bytes in any mixture."""
    if method == GENERATE:
        return _forge_generation(rng)
    item = rng.choice(DOOR_SPECS if method == OIP_STREAM else SPECS)
    tensors = []
    for wanted in rng.choices(item.signature.inputs, k=rng.choice((1, 1, 3, 4))) if rng.random() < 0.2 else item.signature.inputs:
        shape = [rng.choice(_EXTENTS) if rng.random() < 0.1 else 2 if isinstance(extent, str) else extent for extent in wanted.shape]
        dtype = rng.choice(list(DataType)) if rng.random() < 0.1 else wanted.dtype
        size = prod(max(extent, 0) for extent in shape)
        content = rng.randbytes(rng.randint(0, 40))
        if size < 1000 and rng.random() < 0.9:
            content = _raw(dtype, [max(extent, 0) for extent in shape])
        tensors.append((rng.choice((wanted.name, wanted.name, wanted.name, wanted.name, "", "x", "\u2603")), dtype, shape, content))
    model = item.model if rng.random() < 0.95 else rng.choice(("", "nope", "e" * 300))
    revision = rng.choice(("", "", "", item.revision, item.revision[:8], item.revision[:7], "1", "zzzzzzzzz"))
    names = [rng.choice([output.name for output in item.signature.outputs] + ["nope"]) for _ in range(rng.choice((0, 0, 1, 2)))]
    if method == NATIVE:
        return _forge_native(model, revision, tensors, names, rng)
    return _forge_oip(model, revision, tensors, names, rng)


def _forge_generation(rng: random.Random) -> bytes:
    def some(*values: object) -> object:
        return rng.choice(values)

    message = inference_pb2.GenerateRequest.FromString(rng.choice(VALID[GENERATE]))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        part, name, value = rng.choice((
            ("", "model", some("", "nope", "echo", "talker")), ("", "revision", some("", "1", TALKER.revision)),
            ("", "text", some("", "x")),
            ("", "request_id", some("", "\u2603" * 200, "i" * 600)), ("", "num_choices", some(0, 1, 64, 65, 2**32 - 1)),
            ("", "num_top_logprobs", some(0, 20, 21)), ("", "priority", some(0, 100, -101)),
            ("sampling", "temperature", some(0.0, 100.0, 101.0, -1.0, float("nan"))), ("sampling", "top_p", some(0.0, 1.0, float("inf"))),
            ("sampling", "min_p", some(1.0, 1.5)), ("sampling", "repetition_penalty", some(0.0, 100.0, -1.0)),
            ("stop", "max_tokens", some(0, 1, 2**32 - 1)), ("stop", "min_tokens", some(0, 5, 2**32 - 1)),
            ("resume", "stream_id", some("", "s", "s" * 600)), ("resume", "next_sequence", some(0, 2**64 - 1)),
        ))
        setattr(getattr(message, part) if part else message, name, value)
    if rng.random() < 0.1:
        message.stop.strings.extend(rng.choice((["x"] * 15, [""], ["y" * 257])))
    if rng.random() < 0.05:
        message.chat.messages.add(role=rng.choice(("", "user")))
    return message.SerializeToString()


Forged = list[tuple[str, DataType, list[int], bytes]]


def _forge_native(model: str, revision: str, tensors: Forged, names: list[str], rng: random.Random) -> bytes:
    message = inference_pb2.InferRequest(
        model=model, revision=revision, output_names=names, priority=rng.choice((0, 100, -100, 101, -(2**31))),
        request_id=rng.choice(("", "a", "\n", "\u2603" * 200, "i" * 600)),
        inputs=[tensor_pb2.Tensor(name=name, dtype=int(dtype), shape=shape, data=data) for name, dtype, shape, data in tensors],
    )
    if rng.random() < 0.1:
        message.parameters["p"].SetInParent()
    return message.SerializeToString()


def _forge_oip(model: str, revision: str, tensors: Forged, names: list[str], rng: random.Random) -> bytes:
    message = grpc_service_pb2.ModelInferRequest(model_name=model, model_version=revision, id=rng.choice(("", "a", "\n", "i" * 600)))
    is_raw = rng.random() < 0.6
    lists = [field.name for field in grpc_service_pb2.InferTensorContents.DESCRIPTOR.fields]
    for name, dtype, shape, data in tensors:
        item = message.inputs.add(name=name, datatype=dtype.name if rng.random() < 0.95 else rng.choice(("", "FP8")), shape=shape)
        if is_raw or rng.random() < 0.05:
            message.raw_input_contents.append(data)
        if not is_raw or rng.random() < 0.05:
            values = getattr(item.contents, rng.choice(lists))
            kind = bytes if values is item.contents.bytes_contents else int
            values.extend([kind(1)] * min(1000, max(0, prod(shape))))
        if rng.random() < 0.05:
            item.parameters[rng.choice(("shared_memory_region", "classification", "any"))].string_param = "r"
    for name in names:
        message.outputs.add(name=name)
    if rng.random() < 0.3:
        parameter = message.parameters[rng.choice(("priority", "timeout", "sequence_id", "headers", "triton_x", "own"))]
        kind = rng.choice(("bool_param", "int64_param", "uint64_param", "string_param", "double_param", ""))
        if kind == "":
            parameter.SetInParent()
        else:
            values = {"bool_param": True, "string_param": "s", "double_param": float("nan")}
            setattr(parameter, kind, values.get(kind, rng.choice((0, 1, 5_000_000, 2**63 - 1))))
    return message.SerializeToString()


VALID = _valid_messages()
