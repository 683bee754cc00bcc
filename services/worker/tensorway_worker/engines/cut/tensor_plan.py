"""Which layers of a model are cut into tensor shards, and how: transformers' own plans, ours for encoders, an author's in model.yaml.

A plan maps patterns of module names (`*` stands for one part of a dotted name) to the words of transformers:

    colwise                 the layer's outputs are cut; the next rowwise layer takes them cut
    rowwise                 the layer's inputs are cut; the shards' outputs are summed
    colwise_gather_output   the outputs are cut and joined again at once (also spelt colwise_rep)
    rowwise_split_input     every shard takes its part of a whole input; the outputs are summed (also spelt rowwise_rep)
    embedding_rowwise       the vocabulary is cut; the shards' vectors are summed
    embedding_colwise       the vectors are cut and joined again
    replicated_with_grad_allreduce, replicate    kept whole; it works on what its shard has

`resolve` turns a plan into decisions for one model. Layers are cut by blocks (a rowwise layer and the colwise ones before it) or not at
all: a block that holds a layer which cannot be cut, or a word that is not known here, stays whole on every shard, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile
from typing import Any, Final

from torch import nn

from tensorway.errors import FailedPrecondition


class Word(Enum):
    """How one layer is cut."""

    COLUMN = "colwise"
    ROW = "rowwise"
    COLUMN_JOINED = "colwise_gather_output"
    ROW_FROM_WHOLE = "rowwise_split_input"
    VOCABULARY = "embedding_rowwise"
    VECTORS = "embedding_colwise"
    WHOLE = "replicate"


_WORDS: Final[Mapping[str, Word]] = {
    **{word.value: word for word in Word},
    "colwise_rep": Word.COLUMN_JOINED,
    "rowwise_rep": Word.ROW_FROM_WHOLE,
    "replicated_with_grad_allreduce": Word.WHOLE,
}
_EMBEDDINGS: Final = (Word.VOCABULARY, Word.VECTORS)
#: Cut by themselves: they take and make whole tensors.
_ALONE: Final = (Word.COLUMN_JOINED, Word.ROW_FROM_WHOLE, Word.VOCABULARY, Word.VECTORS)

_BERT: Final[Mapping[str, str]] = {
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
_DISTILBERT: Final[Mapping[str, str]] = {
    "transformer.layer.*.attention.q_lin": "colwise",
    "transformer.layer.*.attention.k_lin": "colwise",
    "transformer.layer.*.attention.v_lin": "colwise",
    "transformer.layer.*.attention.out_lin": "rowwise",
    "transformer.layer.*.ffn.lin1": "colwise",
    "transformer.layer.*.ffn.lin2": "rowwise",
}
#: model_type -> plan, for encoders that have none in transformers. Only what the tests cut and compare stands here.
_ENCODERS: Final[Mapping[str, Mapping[str, str]]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "data2vec-text"), _BERT),
    "distilbert": _DISTILBERT,
}
#: Attributes under which attention modules keep the width of a head.
_HEAD_WIDTH: Final = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
#: Attributes under which they keep the number of heads.
_NUM_HEADS: Final = ("num_heads", "num_attention_heads", "n_heads")
_LOOKS_LIKE_ATTENTION: Final = re.compile(r"att(n|ention)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class KeptWhole:
    """A module, or a block of modules by its first, that every shard holds whole although tensor shards were asked for."""

    module: str
    reason: str


@dataclass(frozen=True, slots=True)
class Decisions:
    """A plan applied to one model and one number of shards."""

    #: Module name -> how it is cut.
    cut: Mapping[str, Word]
    kept_whole: Sequence[KeptWhole]
    #: The cut modules that belong together: a rowwise layer after the colwise layers that feed it.
    blocks: Sequence[tuple[str, ...]]


@dataclass(slots=True)
class _Block:
    """The planned layers of one block, in the model's order."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    words: dict[str, Word] = field(default_factory=dict)
    #: Why it cannot be cut, the first reason found.
    reason: str = ""

    def refuse(self, reason: str) -> None:
        self.reason = self.reason or reason


def plan_of(model: nn.Module, wanted: Mapping[str, str] | None = None) -> dict[str, str]:
    """The plan of a model: pattern of a module's name -> word.

    Args:
        model: any module; a transformers model brings its own plan (`tp_plan`), BERT-like encoders get one from here.
        wanted: `settings.tensor_plan` of model.yaml; its patterns go before the model's own.

    Raises FailedPrecondition where `wanted` is no mapping of texts.
    """
    if wanted is not None and not (isinstance(wanted, Mapping) and all(isinstance(x, str) for pair in wanted.items() for x in pair)):
        raise FailedPrecondition(
            "settings.tensor_plan must map patterns of module names to words, e.g. {'layers.*.up': colwise}", field="settings.tensor_plan"
        )
    own = dict(getattr(model, "tp_plan", None) or {})
    config = getattr(model, "config", None)
    if not own and config is not None:
        base = getattr(model, "base_model", model)
        prefix = "" if base is model else f"{model.base_model_prefix}."
        own = {f"{prefix}{pattern}": word for pattern, word in _ENCODERS.get(config.model_type, {}).items()}
    return {**(wanted or {}), **{pattern: word for pattern, word in own.items() if pattern not in (wanted or {})}}


def resolve(model: nn.Module, plan: Mapping[str, str], num_shards: int) -> Decisions:
    """Applies `plan` to the modules that are there (in a pipeline: this stage's), for `num_shards` >= 2 shards."""
    patterns = [(re.compile(_expression(pattern)), word) for pattern, word in plan.items()]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    cut: dict[str, Word] = {}
    kept: list[KeptWhole] = []
    blocks: list[tuple[str, ...]] = []
    for block in _blocks(model, patterns, prefix):
        _check(model, block, num_shards)
        if block.reason:
            kept.append(KeptWhole(_title(list(block.modules)), block.reason))
            continue
        cut.update(block.words)
        blocks.append(tuple(block.words))
    if not plan:
        kept.append(KeptWhole("", f"{type(model).__name__} has no tensor plan; give one in settings.tensor_plan, or leave tensor at 1"))
    return Decisions(cut, kept, blocks)


def summary(kept_whole: Iterable[KeptWhole]) -> list[str]:
    """One line for each reason, with the modules it holds for: numbers of layers are written as `*`."""
    modules: dict[str, list[str]] = {}
    for kept in kept_whole:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", kept.module)
        found = modules.setdefault(kept.reason, [])
        if pattern not in found:
            found.append(pattern)
    return [f"{', '.join(found)}: {reason}" if found != [""] else reason for reason, found in modules.items()]


def _expression(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"[^.]+")


def _word_of(name: str, patterns: Sequence[tuple[re.Pattern[str], str]], prefix: str) -> str | None:
    for expression, word in patterns:
        if expression.fullmatch(name) or (name.startswith(prefix) and expression.fullmatch(name.removeprefix(prefix))):
            return word
    return None


def _blocks(model: nn.Module, patterns: Sequence[tuple[re.Pattern[str], str]], prefix: str) -> list[_Block]:
    """Planned modules as blocks. A rowwise layer ends a block; so does the end of the layer (the last number in a name)."""
    found: list[_Block] = []
    #: Module that holds something planned that cannot be cut -> why; whatever else it holds may depend on that being cut.
    spoiled: dict[str, str] = {}
    open_block: _Block | None = None
    open_in = ""
    for name, module in model.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            if said := _word_of(f"{name}.{parameter}", patterns, prefix):
                spoiled[name] = f"the plan cuts the parameter {parameter} ({said}), and only whole layers can be cut"
        said = _word_of(name, patterns, prefix)
        word = _WORDS.get(said or "")
        if said is not None and word is None:
            spoiled[name.rpartition(".")[0]] = f"the plan's word {said!r} is not known to Tensorway"
        if word is None or (word is Word.WHOLE and not isinstance(module, nn.Linear)):
            continue
        if word in _ALONE:
            found.append(_Block({name: module}, {name: word}))
            continue
        if open_block is None or open_in != _layer_of(name):
            open_block, open_in = _Block(), _layer_of(name)
            found.append(open_block)
        open_block.modules[name] = module
        open_block.words[name] = word
        if word is Word.WHOLE:
            open_block.refuse(f"the plan keeps {name} whole, and what it makes may meet what is cut")
        if word is Word.ROW:
            open_block = None
    for scope, reason in spoiled.items():
        inside = [block for block in found if any(name.startswith(f"{scope}.") for name in block.modules)]
        for block in inside:
            block.refuse(reason)
        if not inside:
            found.append(_Block({scope: model.get_submodule(scope)}, reason=reason))
    return found


def _title(names: Sequence[str]) -> str:
    """What to call a block: the module that holds all of it, or its first module where that is the whole layer."""
    parts = list(takewhile(lambda same: len(set(same)) == 1, zip(*(name.split(".") for name in names), strict=False)))
    title = ".".join(same[0] for same in parts)
    return title if len(title) > len(_layer_of(names[0])) else names[0]


def _layer_of(name: str) -> str:
    """`encoder.layer.3.output.dense` -> `encoder.layer.3`; empty for a name without a number."""
    numbered = re.match(r"((?:.*\.)?\d+)\.", name)
    return numbered.group(1) if numbered else ""


def _check(model: nn.Module, block: _Block, num_shards: int) -> None:
    """Refuses what cannot be cut, with a plain reason."""
    for name, word in block.words.items():
        wanted = nn.Embedding if word in _EMBEDDINGS else nn.Linear
        if type(block.modules[name]) is not wanted:
            block.refuse(f"{name} is a {type(block.modules[name]).__name__}; only {wanted.__name__} layers can be cut like this")
        if getattr(block.modules[name], "max_norm", None) is not None:
            block.refuse(f"{name} rescales its vectors (max_norm)")
    if block.reason:
        return
    words = list(block.words.values())
    if words[0] in _ALONE:
        (module,) = block.modules.values()
        width = _width(module, words[0])
        if width % num_shards:
            block.refuse(f"its width of {width} does not divide by {num_shards}")
    elif words[-1] is not Word.ROW or len(words) < 2:
        block.refuse("colwise layers must be followed by a rowwise one in the same layer of the model")
    else:
        _check_pair(model, block, num_shards)


def _width(module: Any, word: Word) -> int:
    """The extent that is cut."""
    names = {Word.VOCABULARY: "num_embeddings", Word.VECTORS: "embedding_dim", Word.COLUMN_JOINED: "out_features"}
    return int(getattr(module, names.get(word, "in_features")))


def _check_pair(model: nn.Module, block: _Block, num_shards: int) -> None:
    """Colwise layers and the rowwise one that takes what they make: heads may not be torn, fused layers not be cut."""
    *columns, row = (module for module in block.modules.values() if isinstance(module, nn.Linear))
    widths = [column.out_features for column in columns]
    first = next(iter(block.modules))
    head_width = _head_width(model, first, row.in_features)
    is_attention = head_width is not None or _LOOKS_LIKE_ATTENTION.search(first.removeprefix(_layer_of(first))) is not None
    if not is_attention:
        if set(widths) != {row.in_features}:
            block.refuse(_mismatch(widths, row.in_features))
        elif row.in_features % num_shards:
            block.refuse(f"its width of {row.in_features} does not divide by {num_shards}")
    elif not head_width:
        block.refuse("it looks like attention, but says nowhere how many heads it has (head_dim or num_heads)")
    elif max(widths) != row.in_features or any(width % head_width for width in widths):
        block.refuse(_mismatch(widths, row.in_features))
    else:
        heads, key_value_heads = row.in_features // head_width, min(widths) // head_width
        if heads % num_shards or key_value_heads % num_shards:
            of_pairs = f" and {key_value_heads} key/value heads" if key_value_heads != heads else ""
            block.refuse(f"{heads} heads{of_pairs} do not divide by {num_shards}")


def _mismatch(widths: Sequence[int], row_width: int) -> str:
    made = ", ".join(map(str, widths))
    return f"its colwise layers make {made} numbers, its rowwise layer takes {row_width}: a fused layer cannot be cut"


def _head_width(model: nn.Module, name: str, row_width: int) -> int | None:
    """Numbers in one head of the attention that `name` belongs to, as its module says, or the next one outside of it within the layer;
    None where none says so."""
    layer = _layer_of(name)
    while (name := name.rpartition(".")[0]) != layer:
        module = model.get_submodule(name)
        for attribute in _HEAD_WIDTH:
            if isinstance(width := getattr(module, attribute, None), int):
                return width
        for attribute in _NUM_HEADS:
            if isinstance(heads := getattr(module, attribute, None), int) and heads > 0:
                return row_width // heads
    return None
