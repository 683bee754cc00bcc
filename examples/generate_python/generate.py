"""Streams an answer of a language model with generated stubs and grpcio alone, and goes on where it was when its connection breaks.

    python generate.py "Why is the sky blue?"
    python generate.py --drop-after 5 "Why is the sky blue?"    # breaks its own connection after 5 messages, and resumes
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator

import grpc  # noqa: TID251 - this example is about grpcio itself

# The stubs, made of the protos; see README.md. Nothing else of Tensorway is imported.
from tensorway.v1 import inference_pb2, inference_pb2_grpc

MAX_ATTEMPTS = 5


class Answer:
    """What is known of a stream: enough to go on with it anywhere."""

    def __init__(self) -> None:
        self.stream_id = ""
        self.seed = 0
        self.next_sequence = 0
        self.first_token_s = 0.0
        self.began_s = time.monotonic()
        self.finished: inference_pb2.Finished | None = None

    def take(self, message: inference_pb2.GenerateResponse) -> str:
        """The text that a message adds. Every message of the stream comes once, whatever happens to connections."""
        if message.sequence != self.next_sequence:
            raise RuntimeError(f"message {message.sequence} came where {self.next_sequence} was due")
        self.next_sequence += 1
        event = message.WhichOneof("event")
        if event == "started":
            self.stream_id, self.seed = message.started.stream_id, message.started.seed
        elif event == "delta":
            self.first_token_s = self.first_token_s or time.monotonic() - self.began_s
            return message.delta.text
        else:
            self.finished = message.finished
        return ""

    def resume(self) -> inference_pb2.GenerateRequest:
        """Asks for what is missing."""
        return inference_pb2.GenerateRequest(resume=inference_pb2.Resume(stream_id=self.stream_id, next_sequence=self.next_sequence))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompt", nargs="*", default=["Why is the sky blue?"])
    parser.add_argument("--endpoint", default=os.environ.get("TENSORWAY_ENDPOINT", "localhost:8001"), help="the gateway, host:port")
    parser.add_argument("--model", default="smollm2-chat", help="a model that generates")
    parser.add_argument("--system", default="", help="what the model is told first")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    parser.add_argument("--seed", type=int, default=None, help="the same seed draws the same answer")
    parser.add_argument("--stop", action="append", default=[], help="the answer ends before this text; repeat for several")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="deadline of the whole answer, seconds")
    parser.add_argument("--drop-after", type=int, default=0, help="break the connection after so many messages, and resume")
    return parser.parse_args()


def first_request(arguments: argparse.Namespace) -> inference_pb2.GenerateRequest:
    """The request that begins the stream."""
    messages = [inference_pb2.ChatMessage(role="user", content=" ".join(arguments.prompt))]
    if arguments.system:
        messages.insert(0, inference_pb2.ChatMessage(role="system", content=arguments.system))
    return inference_pb2.GenerateRequest(
        model=arguments.model,
        chat=inference_pb2.Chat(messages=messages),
        sampling=inference_pb2.Sampling(temperature=arguments.temperature, seed=arguments.seed),
        stop=inference_pb2.Stop(max_tokens=arguments.max_tokens, strings=arguments.stop),
    )


def messages_of(
    endpoint: str, request: inference_pb2.GenerateRequest, timeout_s: float
) -> Iterator[inference_pb2.GenerateResponse]:
    """One call, on a connection of its own. Whoever stops reading cancels it."""
    with grpc.insecure_channel(endpoint) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        yield from stub.Generate(request, timeout=timeout_s)


def texts(arguments: argparse.Namespace, answer: Answer) -> Iterator[str]:
    """The answer's pieces of text, over as many connections as it takes. Raises grpc.RpcError."""
    deadline_s = time.monotonic() + arguments.timeout_s
    request, drop_after = first_request(arguments), arguments.drop_after
    for number in range(1, MAX_ATTEMPTS + 1):
        try:
            for message in messages_of(arguments.endpoint, request, max(0.0, deadline_s - time.monotonic())):
                yield answer.take(message)
                if answer.next_sequence == drop_after:
                    break
            else:
                return
            sys.stderr.write(f"\n[the connection was dropped on purpose; going on from message {answer.next_sequence}]\n")
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or number == MAX_ATTEMPTS:
                raise
            time.sleep(0.1 * 2 ** (number - 1))  # noqa: TID251 - a program without a loop may wait
        if answer.stream_id:
            request, drop_after = answer.resume(), 0


def main() -> int:
    """Prints one answer; returns the exit status."""
    arguments, answer = parse_arguments(), Answer()
    try:
        for text in texts(arguments, answer):
            print(text, end="", flush=True)
    except grpc.RpcError as error:
        print(f"\n{error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if answer.finished is None:
        return 1
    usage, reason = answer.finished.usage, inference_pb2.FinishReason.Name(answer.finished.reason)
    print(
        f"\n{usage.num_completion_tokens} tokens in {time.monotonic() - answer.began_s:.2f} s, the first after "
        f"{answer.first_token_s * 1e3:.0f} ms; {reason}; attempts {answer.finished.num_attempts}; seed {answer.seed}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
