"""Embeds sentences with the synchronous client and prints which of them mean the same.

Start a mesh that serves `minilm` first (`tensorway up models --model minilm`), then:

    python examples/python/client.py "A cat sleeps." "A kitten naps." "Shares fell."
"""

from __future__ import annotations

import argparse

from tensorway import Client
from tensorway.errors import TensorwayError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sentences", nargs="*", default=["A cat sleeps.", "A kitten naps.", "Shares fell sharply today."])
    parser.add_argument("--endpoint", default="localhost:8001", help="the gateway, host:port")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="deadline of the request, seconds")
    return parser.parse_args()


def main() -> None:
    """One request with a row for each sentence; cosine similarity of every pair, closest first."""
    arguments = parse_arguments()
    sentences: list[str] = arguments.sentences
    with Client(arguments.endpoint, timeout_s=arguments.timeout_s) as client:
        result = client.infer("minilm", {"text": sentences})
    embedding = result["embedding"]  # numpy, FP32 [rows, 384], every row of length 1
    pairs = [(float(embedding[i] @ embedding[j]), i, j) for i in range(len(sentences)) for j in range(i)]
    for similarity, i, j in sorted(pairs, reverse=True):
        print(f"{similarity:5.2f}  {sentences[j]}  /  {sentences[i]}")
    print(f"revision {result.revision[:12]}: {result.timing}")


if __name__ == "__main__":
    try:
        main()
    except TensorwayError as error:
        raise SystemExit(f"{error.status.name}: {error}") from None
