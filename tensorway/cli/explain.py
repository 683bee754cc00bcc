"""`tensorway explain`: what in the input made the model answer as it did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tensorway.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.text import Text

    from tensorway.client import Client
    from tensorway.explaining import Explain
    from tensorway.results import InferResult, ModelDescription

#: Background of the strongest attribution, red, green, blue: for the score, and against it.
_FOR: Final = (0, 150, 60)
_AGAINST: Final = (200, 40, 40)
_MOST_LISTED: Final = 10
#: Share of the strongest below which a token stays without a background.
_FAINT: Final = 0.02


def explain(
    model: Annotated[str, typer.Argument(help="Name of the model; `tensorway models` lists them.")],
    text: Annotated[list[str] | None, typer.Option(help="One row for the model's only BYTES input; repeat for several rows.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="NAME=JSON or NAME=@file.npy, as for `tensorway infer`; repeat.")
    ] = None,
    toward: Annotated[str, typer.Option(help="For embeddings: explain the similarity to this text.")] = "",
    method: Annotated[str, typer.Option(help="saliency, input_x_gradient or integrated_gradients.")] = "integrated_gradients",
    of: Annotated[str, typer.Option(help="Name of the input to explain; default: the first that has a derivative.")] = "",
    output: Annotated[str, typer.Option(help="Name of the output; default: the first.")] = "",
    index: Annotated[str, typer.Option(help="Element of a row of the output, e.g. 207 or 3,5; default: the largest.")] = "",
    points: Annotated[int, typer.Option(min=0, max=1000, help="Points of integrated gradients; 0: 50.")] = 0,
    differentiation: Annotated[str, typer.Option(help="vjp or dist_autograd; default: what fits the group.")] = "",
    endpoint: Annotated[str, typer.Option(envvar="TENSORWAY_ENDPOINT", help="The gateway.")] = "localhost:8001",
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Deadline, seconds.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all values as JSON instead of coloured text.")] = False,
) -> None:
    """Show how much each part of the input contributed to what the model answered.

    Why are these sentences alike:  `tensorway explain minilm --text "a cat sat on the mat" --toward "a kitten"`

    Why this next token:            `tensorway explain smollm2-text --text "The capital of France is"`

    Numbers, which inputs matter:   `tensorway explain my-model --input 'x=[[1, 2, 3]]' --index 0 --method saliency`

    Green speaks for the score, red against it; the stronger the colour, the more. The integrated gradients of a row add up to its score
    minus the score of an empty input; `gap` tells by how much they miss it.
    """
    from tensorway.cli.connection import connect
    from tensorway.cli.infer import read_inputs
    from tensorway.explaining import Explain

    with connect(endpoint, timeout_s=timeout_s) as client:
        description = client.model(model)
        tensors = read_inputs(description.inputs, inputs or (), text or ())
        wish = Explain(
            method=method, input=of, output=output, index=_read_index(index), num_points=points, differentiation=differentiation,
            weights=_toward(client, description, output, toward) if toward else None,
        )
        result = client.explain(model, tensors, wish)
    if as_json:
        from tensorway.arrays import to_nested

        print(json.dumps({tensor.name: to_nested(tensor) for tensor in result.tensors}))
        return
    _show(result, wish)


def _toward(client: Client, description: ModelDescription, output: str, text: str) -> Any:
    """The embedding of `text`: the output times it is the similarity."""
    from tensorway.cli.infer import read_inputs

    name = output or description.outputs[0].name
    return client.infer(description.name, read_inputs(description.inputs, (), (text,)))[name][0]


def _read_index(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidRequest(f"--index {text!r}: write whole numbers separated by commas, e.g. 3,5", field="index") from error


def _show(result: InferResult, wish: Explain) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(Text(f"{result.model} · revision {result.revision[:12]} · {wish.method}"), soft_wrap=True)
    attribution, tokens = result["attribution"], result.get("tokens")
    for row in range(len(attribution)):
        console.print(Text(_headline(result, row), style="bold"))
        values = attribution[row].reshape(-1).tolist()
        if tokens is None:
            console.print(_largest(attribution[row]))
        else:
            console.print(coloured([token.decode("utf-8", "replace") for token in tokens[row]], values), soft_wrap=True)
    console.print(Text(str(result.timing), style="dim"), soft_wrap=True)


def _headline(result: InferResult, row: int) -> str:
    chosen = int(result["chosen"][row])
    gap = f" · gap {float(result['gap'][row]):+.4f}" if "gap" in result else ""
    return f"row {row} · score {float(result['score'][row]):.4f}" + (f" · element {chosen}" if chosen >= 0 else "") + gap


def coloured(tokens: Sequence[str], values: Sequence[float]) -> Text:
    """The tokens one after the other, each on a background as strong as its value."""
    from rich.text import Text

    strongest = max((abs(value) for value in values), default=0.0) or 1.0
    shown = Text()
    for token, value in zip(tokens, values, strict=True):
        share = abs(value) / strongest
        red, green, blue = (int(part * share) for part in (_FOR if value > 0 else _AGAINST))
        shown.append(token or "∅", style=f"white on rgb({red},{green},{blue})" if share > _FAINT else "")
        shown.append(" ")
    return shown


def _largest(attribution: Any) -> Text:
    """The elements with the strongest attributions, as a list."""
    from rich.text import Text

    flat = attribution.reshape(-1)
    order = sorted(range(flat.size), key=lambda place: -abs(float(flat[place])))[:_MOST_LISTED]
    lines: list[str] = []
    for place in order:
        index, rest = [], place
        for extent in reversed(attribution.shape):
            rest, part = divmod(rest, extent)
            index.append(part)
        lines.append(f"  {index[::-1]}  {float(flat[place]):+.6f}")
    return Text("\n".join(lines))
