"""A transformers language model as a rank of a generating group runs it: one step of many answers at once, and the draw after it.

Settings: `task: generation`; `cuda_graphs: true` runs decode steps of a whole model on a CUDA device as graphs; and those of the engine
`transformers` that say where the model comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, cast

import torch
import transformers

from tensorway.errors import FailedPrecondition
from tensorway.generation import GenerationYaml
from tensorway.model import Inputs, Outputs
from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.cut.assembly import Uncut
from tensorway_worker.engines.generation.attention import NAME, KeyValueCache, attend, attending, no_mask
from tensorway_worker.engines.generation.graphs import DecodeGraphs
from tensorway_worker.engines.generation.layout import DRAWING, StepLayout, carried
from tensorway_worker.engines.generation.packing import pack
from tensorway_worker.engines.generation.requests import Sampling
from tensorway_worker.engines.generation.sampler import RowToDraw, SamplingRows, sample
from tensorway_worker.engines.generation.scheduler import Row, Sequence
from tensorway_worker.engines.generation.text import TextSide, read_text_side
from tensorway_worker.engines.port import Cut
from tensorway_worker.engines.transformers import TransformersEngine

_CACHED_LAYERS: Final = frozenset({"full_attention", "sliding_attention"})
#: Of a model that does not say how many tokens it was made for.
_DEFAULT_CONTEXT: Final = 2048
#: Answers in the step whose time is shared out among stages, and their tokens so far.
_SIZED_ROWS: Final = 16
_SIZED_LENGTH: Final = 64


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What the leader needs to know to schedule."""

    num_blocks: int
    block_tokens: int
    #: Tokens of a prompt and its answer.
    max_context: int
    vocabulary: int


class GenerationEngine(TransformersEngine):
    """Implements `Engine`. `run` takes a step's carry (`layout.py`) and returns what was drawn (`Sampled.to_tensors`)."""

    def __init__(self, directory: ModelDirectory, device: str, cut: Cut | None = None) -> None:
        super().__init__(directory, device, cut)
        # Text is made of tokens, and tokens of text, by the leader, not around each step.
        self._text = ""
        self.has_preprocess = False
        self._generation: GenerationYaml = directory.yaml.generation or GenerationYaml()
        self._cache: KeyValueCache | None = None
        self._seen_whole: torch.Tensor | None = None
        self.dimensions = Dimensions(0, self._generation.block_tokens, 0, 0)
        self._graphs: DecodeGraphs | None = None
        #: Of weights that only exist in oneDNN's own order.
        self._packed_bytes = 0
        #: Of the leader, once it is loaded.
        self.text: TextSide | None = None

    def load(self) -> None:
        super().load()
        with torch.inference_mode(False), torch.no_grad():
            self._packed_bytes = pack(self._model)
        self._graphs = self._open_graphs()
        if self._cut is None or (self._cut.place.is_first and not self._cut.place.shard):
            self.text = read_text_side(self._pretrained.files, str(self._settings.get("weights", "")))

    def _adopt(self, model: Any) -> None:
        super()._adopt(model)
        _refuse_unfit(model)
        transformers.AttentionInterface.register(NAME, attend)
        transformers.AttentionMaskInterface.register(NAME, no_mask)
        model.set_attn_implementation(NAME)
        self.dimensions = _dimensions(model, self._generation)
        # One more than all blocks have, for rows of a step that nobody asked for (`graphs.py`).
        places = self.dimensions.num_blocks * self.dimensions.block_tokens + 1
        self._cache = KeyValueCache(places, is_touched=bool(self._directory.yaml.memory_limit_mb))
        # Four dimensions are taken as they are: transformers makes no mask of its own.
        self._seen_whole = torch.ones((1, 1, 1, 1), device=self.device)

    def _whole(self, inputs: Inputs) -> Outputs:
        carry = cast("dict[str, torch.Tensor]", inputs)
        # As many draws as tokens: every row brings one token and draws after it.
        if self._graphs is not None and carry["input_ids"].shape[1] == len(carry[DRAWING]):
            logits = self._graphs.logits(inputs)
        else:
            layout = StepLayout.of(inputs, self.dimensions.block_tokens, torch.device(self.device))
            ids, positions, drawing = (carry[name].to(self.device) for name in ("input_ids", "position_ids", DRAWING))
            logits = self._forward(ids, positions, drawing, layout)[0]
        return cast("Outputs", sample(logits, SamplingRows.from_tensors(carry)).to_tensors())

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, drawing: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        """Token ids and positions [1, tokens] -> logits after the tokens at `drawing`, [1, drawing, vocabulary]."""
        if self._cache is None:
            raise FailedPrecondition("the model is not loaded")
        with attending(self._cache, layout):
            logits: torch.Tensor = self._model(
                input_ids=ids, position_ids=positions, attention_mask=self._seen_whole, use_cache=False, logits_to_keep=drawing
            ).logits
        return logits

    def _open_graphs(self) -> DecodeGraphs | None:
        """Where model.yaml asks for them: graphs of a whole model on a CUDA device, whose layers all see as far as each other."""
        if not self._settings.get("cuda_graphs") or self._cut is not None or not self.device.startswith("cuda"):
            return None
        if getattr(self._model.config.get_text_config(), "sliding_window", None):
            raise FailedPrecondition(
                "settings.cuda_graphs: layers with a sliding window cannot be captured; leave it out", field="settings"
            )
        device, spare = torch.device(self.device), self.dimensions.num_blocks * self.dimensions.block_tokens
        return DecodeGraphs(self._forward, device, self._model.dtype, self.dimensions.block_tokens, spare)

    def uncut(self, rows: int = 0) -> Uncut:
        # Nearly all steps advance answers by a token each: those are to take as long in every stage.
        uncut = super().uncut(rows)
        return replace(uncut, sized_example=self._made_up(rows or _SIZED_ROWS, _SIZED_LENGTH, 1))

    def _example(self, rows: int, length: int) -> Inputs:
        """So many prompts, each of them in one piece, with one draw after it.

        Only one token may be drawn: what is compared with another's step is its probability, and two tokens that are nearly as likely make
        no difference.
        """
        size = min(length, self.dimensions.max_context - 1)
        carry = self._made_up(rows, size, size)
        others = range(1, self.dimensions.vocabulary)
        draws: list[RowToDraw] = [(Sampling(), size, others, (), 0) for _ in range(len(cast("torch.Tensor", carry[DRAWING])))]
        return {**carry, **cast("Inputs", SamplingRows.of(draws).to_tensors())}

    def _made_up(self, rows: int, size: int, count: int) -> Inputs:
        """The last `count` tokens of each of `rows` sequences of `size` tokens, and a draw after it."""
        size = min(size, self.dimensions.max_context - 1)
        num_blocks = -(-size // self.dimensions.block_tokens)
        rows = max(1, min(rows, self.dimensions.num_blocks // num_blocks))
        sequences = [
            Sequence(
                id=row,
                ids=[(row * 131 + place * 17) % self.dimensions.vocabulary for place in range(size)],
                blocks=list(range(row * num_blocks, (row + 1) * num_blocks)),
            )
            for row in range(rows)
        ]
        draws: list[RowToDraw] = [(Sampling(), size, (), (), None) for _ in sequences]
        carry = carried([Row(one, size - count, count) for one in sequences])
        return {**carry, **cast("Inputs", SamplingRows.of(draws).to_tensors())}

    def embedding(self, name: str) -> torch.nn.Module | None:
        return None

    def memory_bytes(self) -> int:
        return super().memory_bytes() + self._packed_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of this rank's keys and values, used or not."""
        return 0 if self._cache is None else self._cache.num_bytes


def _refuse_unfit(model: Any) -> None:
    """Raises FailedPrecondition for a model whose tokens see each other otherwise than through transformers' attention interface."""
    name = type(model).__name__
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _CACHED_LAYERS
    if kinds:
        raise FailedPrecondition(f"generation: {name} has layers of kind {', '.join(sorted(kinds))}, which keep no keys and values")
    if not getattr(model, "_supports_attention_backend", False):
        raise FailedPrecondition(f"generation: {name} has an attention of its own, which cannot read keys and values in blocks")


def _dimensions(model: Any, yaml: GenerationYaml) -> Dimensions:
    config = model.config.get_text_config()
    made_for = getattr(config, "max_position_embeddings", None) or _DEFAULT_CONTEXT
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept_heads = getattr(config, "num_key_value_heads", None) or heads
    # Every rank must come to the same number: it is that of the whole model's layers and heads, however they are cut.
    token_bytes = 2 * config.num_hidden_layers * kept_heads * width * model.dtype.itemsize
    num_blocks = (yaml.kv_cache_mb << 20) // (token_bytes * yaml.block_tokens)
    if num_blocks < 1:
        needed = -(-token_bytes * yaml.block_tokens >> 20)
        raise FailedPrecondition(
            f"generation.kv_cache_mb: {yaml.kv_cache_mb} MiB hold no block of {yaml.block_tokens} tokens, which takes {needed} MiB",
            field="generation.kv_cache_mb",
        )
    context = min(yaml.max_context or made_for, made_for, num_blocks * yaml.block_tokens)
    return Dimensions(num_blocks, yaml.block_tokens, context, config.vocab_size)


def generation_engine(directory: ModelDirectory, device: str, cut: Cut | None = None) -> GenerationEngine:
    """An engine for `directory`, or for a rank's part of it."""
    return GenerationEngine(directory, device, cut)
