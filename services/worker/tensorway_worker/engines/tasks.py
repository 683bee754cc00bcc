"""What the engine `transformers` can be asked for: which of the library's models does it, and what of its result is the output.

embedding: mean over the attended tokens, of length 1. classification: logits. causal-lm: a language model's logits for the next token, at
every position or (`settings.positions: last`) after each row's last attended token. generation: a language model's own next tokens; its
steps are those of `engines/generation`.

Everything here is differentiable, and in a pipeline it is the last stage that takes the outputs: the inputs travel there with the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from tensorway.errors import FailedPrecondition
from tensorway.model import Inputs, Outputs


@dataclass(frozen=True, slots=True)
class Task:
    """One task. Plain functions of a model's inputs and result, so that every engine that runs transformers models can share it."""

    name: str
    #: The class of transformers whose `from_pretrained` / `from_config` makes the model.
    auto: str
    #: (what the model returned, its inputs) -> the one output. Dimension 0 = rows.
    _output: Callable[[Any, Inputs], torch.Tensor]
    #: (inputs, names of arguments that the model's forward takes) -> arguments of forward besides the inputs.
    _arguments: Callable[[Inputs, frozenset[str]], dict[str, Any]]

    def outputs(self, result: Any, inputs: Inputs, output_name: str) -> Outputs:
        """The outputs of one step.

        Args:
            result: what the model's forward returned for `inputs` and `arguments(inputs, …)`.
            output_name: how the signature calls the one output.
        """
        return {output_name: self._output(result, inputs)}

    def arguments(self, inputs: Inputs, accepted: frozenset[str]) -> dict[str, Any]:
        """What forward is to be called with besides `inputs`.

        Args:
            accepted: `accepted_arguments` of the model, asked once.
        """
        return self._arguments(inputs, accepted)


def accepted_arguments(model: torch.nn.Module) -> frozenset[str]:
    """Names of the arguments that the model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def task_of(settings: Mapping[str, Any]) -> Task:
    """The task that `settings.task` and `settings.positions` ask for. Raises FailedPrecondition where there is no such."""
    name = settings.get("task")
    if not isinstance(name, str) or name not in TASKS:
        raise FailedPrecondition(f"settings.task must be one of {', '.join(TASKS)}, got {name!r}", field="settings.task")
    positions = settings.get("positions", "all")
    if positions not in ("all", "last") or ("positions" in settings and name != _CAUSAL_LM):
        raise FailedPrecondition(
            f"settings.positions must be all or last, and is for task {_CAUSAL_LM} only, got {positions!r}", field="settings.positions"
        )
    if positions == "last":
        return replace(TASKS[name], _output=_last_logits, _arguments=_for_last)
    return TASKS[name]


def _mean_pooled(result: Any, inputs: Inputs) -> torch.Tensor:
    """Mean of the attended tokens' states, of length 1. States [rows, length, width] -> [rows, width]."""
    hidden: torch.Tensor = result.last_hidden_state
    weights = torch.as_tensor(inputs["attention_mask"]).unsqueeze(-1).to(hidden.dtype)
    summed = (hidden * weights).sum(dim=1)
    return torch.nn.functional.normalize(summed / weights.sum(dim=1).clamp(min=1e-9), p=2.0, dim=1)


def _logits(result: Any, inputs: Inputs) -> torch.Tensor:
    logits: torch.Tensor = result.logits
    return logits


def _last_logits(result: Any, inputs: Inputs) -> torch.Tensor:
    """[rows, vocabulary], from logits of the last positions alone ([rows, 1, vocabulary]) or of all."""
    logits: torch.Tensor = result.logits
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(logits), device=logits.device), _last_positions(inputs)]


def _last_positions(inputs: Inputs) -> torch.Tensor:
    """Index of each row's last attended token; batching pads on the right, so this is seldom the last column. [rows]"""
    mask = inputs.get("attention_mask")
    if mask is None:
        ids = inputs["input_ids"]
        return torch.full((ids.shape[0],), ids.shape[1] - 1, device=ids.device)
    # The first attended token from the right; a row without any gives its last column.
    last: torch.Tensor = mask.shape[1] - 1 - (mask != 0).to(torch.int8).flip(1).argmax(dim=1)
    return last


def _nothing_else(inputs: Inputs, accepted: frozenset[str]) -> dict[str, Any]:
    return {}


def _without_cache(inputs: Inputs, accepted: frozenset[str]) -> dict[str, Any]:
    """A step keeps nothing for the next one."""
    return {"use_cache": False} if "use_cache" in accepted else {}


def _for_last(inputs: Inputs, accepted: frozenset[str]) -> dict[str, Any]:
    """Has the head work at one position a row, where the model can be told: it is a large part of a small model's work."""
    arguments = _without_cache(inputs, accepted)
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = _last_positions(inputs).unsqueeze(1)
    return arguments


_CAUSAL_LM: Final = "causal-lm"
GENERATION: Final = "generation"
#: The tasks by name; `task_of` also looks at the other settings.
TASKS: Final[Mapping[str, Task]] = {
    "embedding": Task("embedding", "AutoModel", _mean_pooled, _nothing_else),
    "classification": Task("classification", "AutoModelForSequenceClassification", _logits, _nothing_else),
    _CAUSAL_LM: Task(_CAUSAL_LM, "AutoModelForCausalLM", _logits, _without_cache),
    GENERATION: Task(GENERATION, "AutoModelForCausalLM", _logits, _without_cache),
}
