"""A gateway that knows its callers says which id a new stream has; where it does not, the orchestrator draws one."""

from __future__ import annotations

from tensorway.v1 import inference_pb2, link_pb2
from tensorway_orchestrator.generation_wire import read_generation


def test_a_new_stream_has_the_id_that_the_gateway_gives() -> None:
    request = inference_pb2.GenerateRequest(model="talker", text="hello")
    for given in ("random.tag", ""):
        head = link_pb2.RequestHead(request_id="r", model="talker", rows=1, generate=request, stream_id=given)
        generation = read_generation(head, head.SerializeToString())
        assert generation.stream_id == given or (not given and len(generation.stream_id) > 10)
        assert (generation.next_sequence, generation.so_far) == (0, ())
