"""What transformers tasks return: right positions under padding, nothing kept from step to step, differentiable."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.tasks import TASKS, accepted_arguments, task_of
from tests.unit.worker.smollm2 import transformers_own, transformers_tokenizer, whole_engine

LAST = task_of({"task": "causal-lm", "positions": "last"})
ALL = task_of({"task": "causal-lm"})


@cache
def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def step(task: Any, inputs: dict[str, torch.Tensor], accepted: frozenset[str] | None = None) -> torch.Tensor:
    model = llama()
    arguments = task.arguments(inputs, accepted_arguments(model) if accepted is None else accepted)
    result = model(**inputs, **arguments)
    assert result.past_key_values is None or accepted is not None
    outputs = task.outputs(result, inputs, "logits")
    assert outputs.keys() == {"logits"}
    found: torch.Tensor = outputs["logits"]
    return found


def padded(*lengths: int) -> dict[str, torch.Tensor]:
    """Rows of random ids, filled with zeros on the right."""
    ids = torch.randint(1, 50, (len(lengths), max(lengths, default=4)), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("lengths", [(6, 3, 1, 6), (5, 5), (1,), (1, 1), (9,)])
@pytest.mark.parametrize("accepted", [None, frozenset[str]()], ids=["told the model", "chosen afterwards"])
def test_the_last_position_is_that_of_the_last_attended_token(lengths: tuple[int, ...], accepted: frozenset[str] | None) -> None:
    inputs = padded(*lengths)
    last = step(LAST, inputs, accepted)
    assert last.shape == (len(lengths), 50)
    every = step(ALL, inputs)
    assert every.shape == (len(lengths), max(lengths), 50)
    for row, length in enumerate(lengths):
        assert torch.allclose(last[row], every[row, length - 1], atol=1e-6)
        # And padding tells nothing: the row alone says the same.
        alone = step(LAST, {"input_ids": inputs["input_ids"][row : row + 1, :length]})
        assert torch.allclose(last[row], alone[0], atol=1e-5)


def test_the_head_works_at_one_position_a_row() -> None:
    inputs = padded(6, 3)
    arguments = LAST.arguments(inputs, accepted_arguments(llama()))
    assert llama()(**inputs, **arguments).logits.shape == (2, 1, 50)


def test_a_mask_with_a_gap_or_nothing_in_it() -> None:
    inputs = padded(6, 6, 6)
    inputs["attention_mask"][0, 2] = 0
    inputs["attention_mask"][1, 4:] = 0
    inputs["attention_mask"][2] = 0
    every, last = step(ALL, inputs), step(LAST, inputs)
    assert torch.allclose(last, torch.stack([every[0, 5], every[1, 3], every[2, 5]]), atol=1e-6)


def test_no_mask_means_that_every_token_counts() -> None:
    inputs = {"input_ids": padded(4, 4)["input_ids"]}
    assert torch.allclose(step(LAST, inputs), step(ALL, inputs)[:, -1], atol=1e-6)


def test_logits_are_differentiable() -> None:
    inputs = padded(5, 2)
    embedded = llama().get_input_embeddings()(inputs["input_ids"]).requires_grad_()
    given = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
    result = llama()(**given, **LAST.arguments(inputs, accepted_arguments(llama())))
    (gradient,) = torch.autograd.grad(LAST.outputs(result, inputs, "x")["x"].sum(), [embedded])
    assert gradient[0].abs().sum(dim=1).min() > 0
    assert gradient[1, :2].abs().sum() > 0 and gradient[1, 2:].abs().sum() == 0


def test_every_task_names_a_class_of_transformers() -> None:
    assert {"embedding", "classification", "causal-lm", "generation"} == TASKS.keys()
    for name, task in TASKS.items():
        assert task.name == name and task_of({"task": name}) is task
        assert hasattr(getattr(transformers, task.auto), "from_pretrained")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "settings.task must be one of embedding, classification, causal-lm, generation, got None"),
        ({"task": "poetry"}, "got 'poetry'"),
        ({"task": ["embedding"]}, "got "),
        ({"task": "causal-lm", "positions": "first"}, "settings.positions must be all or last"),
        ({"task": "embedding", "positions": "last"}, "is for task causal-lm only"),
    ],
)
def test_what_is_no_task_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(FailedPrecondition, match=said):
        task_of(settings)


@pytest.mark.models
def test_smollm2_says_what_transformers_says_padded_or_not() -> None:
    engine, reference, tokenizer = whole_engine(), transformers_own(), transformers_tokenizer()
    texts = ["The capital of France is", "Water boils at a temperature of one hundred degrees", "One, two, three,"]
    with torch.inference_mode():
        together = engine.run(dict(tokenizer(texts, return_tensors="pt", padding=True)))["logits"]
        for text, got in zip(texts, torch.as_tensor(together), strict=True):
            inputs = dict(tokenizer(text, return_tensors="pt"))
            expected = reference(**inputs).logits[0, -1]
            assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
            # Alone, it is the very same computation, but that transformers' head works at every position.
            alone = engine.run(inputs)["logits"][0]
            assert torch.equal(alone, reference(**inputs, logits_to_keep=1).logits[0, -1])
    words = [tokenizer.decode(row) for row in torch.as_tensor(together).argmax(dim=-1)]
    assert words[0] == " Paris" and words[2] == " four"
