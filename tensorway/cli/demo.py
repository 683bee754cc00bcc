"""The demonstration of `make run`: real sentences, a real photograph and a real question through the running mesh."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Final

from rich.console import Console
from rich.table import Table

from tensorway.client import AsyncClient
from tensorway.model_directory import FILES_DIR, ModelDirectory
from tensorway.results import Delta

_SENTENCES: Final = (
    "A man is playing a guitar on stage.",
    "Someone performs music with a string instrument.",
    "The stock market fell sharply today.",
    "Shares dropped across the exchange this afternoon.",
    "My cat sleeps on the warm windowsill.",
)


_QUESTION: Final = "What is the capital of France?"


async def show_demo(endpoint: str, directories: Mapping[str, ModelDirectory], console: Console) -> None:
    """Runs what the served models allow, and prints the answers."""
    async with AsyncClient(endpoint) as client:
        if "minilm" in directories:
            await _show_similarities(client, console)
        if "efficientnet-lite0" in directories:
            await _show_photograph(client, directories["efficientnet-lite0"], console)
        if "smollm2-chat" in directories:
            await _show_stream(client, console)


async def _show_stream(client: AsyncClient, console: Console) -> None:
    console.print(f"smollm2-chat: [bold]{_QUESTION}[/]")
    began_s, first_s, num_tokens = time.monotonic(), 0.0, 0
    async for event in client.generate("smollm2-chat", [{"role": "user", "content": _QUESTION}], max_tokens=40):
        if isinstance(event, Delta):
            first_s = first_s or time.monotonic() - began_s
            num_tokens += len(event.token_ids)
            console.print(event.text, end="", highlight=False, markup=False)
    took_s = time.monotonic() - began_s
    console.print(f"\n[dim]{num_tokens} tokens in {took_s:.1f} s, the first after {first_s * 1e3:.0f} ms[/]")


async def _show_similarities(client: AsyncClient, console: Console) -> None:
    result = await client.infer("minilm", {"text": list(_SENTENCES)})
    embedding = result["embedding"]
    similarity = embedding @ embedding.T
    table = Table(title=f"minilm: cosine similarity of {len(_SENTENCES)} sentences")
    table.add_column("sentence")
    for number in range(1, len(_SENTENCES) + 1):
        table.add_column(str(number), justify="right")
    for number, sentence in enumerate(_SENTENCES):
        shades = ("bold green" if value > 0.5 else "yellow" if value > 0.2 else "dim" for value in similarity[number])
        cells = (f"[{shade}]{value:.2f}[/]" for shade, value in zip(shades, similarity[number], strict=True))
        table.add_row(f"{number + 1}  {sentence}", *cells)
    console.print(table)
    timing = result.timing
    console.print(
        f"[dim]queue {timing.queue_us / 1e3:.1f} ms, step {timing.step_us / 1e3:.1f} ms, gateway {timing.gateway_us / 1e3:.1f} ms, "
        f"batch of {timing.batch_rows} rows on {timing.group}[/]", soft_wrap=True,
    )


async def _show_photograph(client: AsyncClient, directory: ModelDirectory, console: Console) -> None:
    photographs = sorted((directory.path / FILES_DIR / "samples").glob("*.jpg"))
    labels = _labels(directory)
    for photograph in photographs:
        result = await client.infer("efficientnet-lite0", {"image": [photograph.read_bytes()]})
        class_id, probability = int(result["class_id"][0]), float(result["probability"][0])
        label = labels[class_id] if labels else ""
        console.print(f"efficientnet-lite0: {photograph.name} is class [bold]{class_id} {label}[/] with probability {probability:.2f}")


def _labels(directory: ModelDirectory) -> tuple[str, ...]:
    """Names of the classes in order, where the model's directory brings them."""
    file = directory.file("labels.json")
    return tuple(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ()
