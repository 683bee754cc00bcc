"""A server that generates by rule, on a real socket: it repeats the question, and can be asked to go on for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tensorway.errors import InvalidRequest, NotFound
from tensorway.transport import create_server
from tensorway.transport.port import Call, ServerOptions, Stream
from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import model_pb2

_GENERATE = "/tensorway.v1.InferenceService/Generate"
_GET_MODEL = "/tensorway.v1.ModelService/GetModel"


@dataclass(slots=True)
class Served:
    """What was asked, and where."""

    endpoint: str = ""
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    async def model(self, message: bytes, call: Call) -> bytes:
        """ModelService.GetModel: there is one model, `talker`."""
        name = model_pb2.GetModelRequest.FromString(message).name
        if name != "talker":
            raise NotFound(f"model {name!r} is unknown here; models known: talker", field="name")
        return model_pb2.GetModelResponse(model=model_pb2.Model(name=name, revision="ab" * 32)).SerializeToString()

    async def generate(self, stream: Stream) -> None:
        """InferenceService.Generate: the last message again, word by word; `endless` never ends, `template` and `broken` fail."""
        request = pb.GenerateRequest.FromString(await stream.read() or b"")
        self.requests.append(request)
        stream.on_cancel(self.cancelled.set)
        said = request.text or request.chat.messages[-1].content
        if said == "template":
            raise InvalidRequest("the model has no chat template; send text or token_ids", field="chat")
        await stream.write(pb.GenerateResponse(started=pb.Started(stream_id="s", model="talker", seed=5)).SerializeToString())
        words, sequence = said.split(" "), 1
        for choice in range(request.num_choices or 1):
            offset = 0
            while offset < len(words) or said == "endless":
                text = words[offset % len(words)] + " "
                delta = pb.Delta(choice=choice, offset=offset, token_ids=[offset], text=text)
                await stream.write(pb.GenerateResponse(sequence=sequence, delta=delta).SerializeToString())
                await asyncio.sleep(0.01)
                offset, sequence = offset + 1, sequence + 1
            usage = pb.Usage(num_prompt_tokens=9, num_completion_tokens=offset)
            finished = pb.Finished(choice=choice, reason=pb.FINISH_REASON_EOS, usage=usage, num_attempts=1)
            await stream.write(pb.GenerateResponse(sequence=sequence, finished=finished).SerializeToString())
            sequence += 1


@contextmanager
def generating_server() -> Iterator[Served]:
    """In a thread of its own."""
    served, ready = Served(), threading.Event()
    loop = asyncio.new_event_loop()
    end = asyncio.Event()

    async def main() -> None:
        server = create_server(ServerOptions("127.0.0.1:0"))
        server.add_stream(_GENERATE, served.generate)
        server.add_unary(_GET_MODEL, served.model)
        served.endpoint = await server.start()
        ready.set()
        await end.wait()
        await server.stop(0.0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(20)
    try:
        yield served
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(20)
        loop.close()
