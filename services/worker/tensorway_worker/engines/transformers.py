"""Engine `transformers`: embedding, classification and language models of the transformers library, whole or a part of one.

Settings:
    task, positions: what the model is asked for, see `tasks.py`.
    directory: folder under files/ that holds config.json, model.safetensors and tokenizer.json (default: files/ itself).
    max_length: most tokens of a text; the rest is cut off (default: what the model can hold).
    weights: a declared weights file (safetensors, GGUF, torch state dict), where it is not called model.safetensors.
    architecture, config, seed: instead of config.json, a class of transformers with its default configuration (updated by `config`) and,
        where `weights` names no file, random weights from `seed`.
    tensor_plan: how layers are cut into tensor shards, over the model's own plan.

A single BYTES input is text and goes through the tokeniser; any other inputs are handed to the model under their own names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy
import torch
import transformers
from tokenizers import Tokenizer

from tensorway.errors import FailedPrecondition, ModelFailed
from tensorway.model import Inputs, InvalidInput, Outputs, Parameters, Value
from tensorway.model_directory import FILES_DIR, ModelDirectory
from tensorway.signature import ROWS, TensorSpec
from tensorway.tensors import DataType
from tensorway_worker.engines.cut.assembly import Uncut, assembled
from tensorway_worker.engines.cut.own_weights import Names, held_bytes, tied_names
from tensorway_worker.engines.cut.tensor_plan import plan_of
from tensorway_worker.engines.cut.weights_source import Slice
from tensorway_worker.engines.port import Cut
from tensorway_worker.engines.pretrained import Pretrained
from tensorway_worker.engines.rewriting import HeldWeight, PretrainedFiles, Rewriting, held
from tensorway_worker.engines.samples import LENGTH, made_up
from tensorway_worker.engines.tasks import accepted_arguments, task_of

#: What a model without a limit of its own gets.
_DEFAULT_MAX_LENGTH: Final = 512
#: Size at which the times of a cut model's layers are measured.
_SIZED_ROWS: Final = 8
_SIZED_LENGTH: Final = 64


class TransformersEngine:
    """One transformers model, or a rank's part of it. Implements `Engine`; see the module's docstring for its settings."""

    has_postprocess = False

    def __init__(self, directory: ModelDirectory, device: str, cut: Cut | None = None) -> None:
        self.device = device
        self._directory = directory
        self._settings = directory.yaml.settings
        self._cut = cut
        self._task = task_of(self._settings)
        signature = directory.spec.signature
        texts = [spec.name for spec in signature.inputs if spec.dtype is DataType.BYTES]
        if texts and len(signature.inputs) > 1:
            raise FailedPrecondition("a text model takes one BYTES input and nothing else", field="inputs")
        if len(signature.outputs) != 1:
            raise FailedPrecondition(f"task {self._task.name} has exactly one output", field="outputs")
        self._text = texts[0] if texts else ""
        self._output = signature.outputs[0].name
        self.has_preprocess = bool(texts)
        # The tokeniser's Rust code lets go of the interpreter and is safe to share between threads.
        self.preprocess_threads = 2 if texts else 1
        self.padding: Mapping[str, float] = {}
        self._pretrained = Pretrained(directory, self._task)
        self._tokenizer: Tokenizer | None = None
        self._model: Any = None
        self._accepted: frozenset[str] = frozenset()
        self._embeddings: Mapping[str, torch.nn.Module] | None = None
        #: Of a cut model: every weight's names in the whole one, and the slices that this rank holds.
        self._names: Names | None = None
        self._slices: Mapping[str, Slice] = {}
        #: The step: the whole model's, or this rank's part of it.
        self._step: Callable[[Inputs], Outputs] = _not_loaded

    def load(self) -> None:
        for declared in self._directory.missing_files():
            raise FailedPrecondition(f"{declared.path} is not there; run `tensorway models fetch` first", field="files")
        # What a rank prints goes to its node's log, where a progress bar says nothing.
        transformers.utils.logging.disable_progress_bar()
        # Weights made under inference_mode could not take part in a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            if self._cut is None:
                self._adopt(self._pretrained.whole(self.device).eval().requires_grad_(False))
                self._step = self._whole
            else:
                self._load_part(self._cut)
        if self._text:
            self._load_tokenizer(self._model.config)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing before it is cut."""
        said = "its weights come from a seed: each rank makes the whole model at load, keeps its own part and frees the rest"
        return (said,) if self._pretrained.is_built_whole else ()

    def uncut(self, rows: int = 0) -> Uncut:
        """The model on the meta device with all that is needed to cut it; afterwards it is this engine's model.

        `rows`: of the sized example; 0 takes a few.
        """
        self._adopt(self._pretrained.empty())
        rows = rows or min(_SIZED_ROWS, self._directory.yaml.batching.max_rows)
        return Uncut(
            name=self._directory.yaml.name,
            root=self._model,
            call=self._whole,
            example=self._example(3, LENGTH),
            sized_example=self._example(rows, _SIZED_LENGTH),
            device=self.device,
            tensor_plan=plan_of(self._model, self._settings.get("tensor_plan")),
        )

    def _load_part(self, cut: Cut) -> None:
        uncut = self.uncut()
        # A file's names are matched to the model as it is before it is cut.
        read = None if self._pretrained.is_built_whole else self._pretrained.read(self._model, self.device)
        self._names = tied_names(self._model)
        part = assembled(uncut, cut, lambda: read or self._pretrained.read(self._model, self.device))
        self._step = part.stage
        self._embeddings = part.embeddings
        self._slices = part.sharding.slices

    def _adopt(self, model: Any) -> None:
        self._model = model
        self._accepted = accepted_arguments(model)

    def _load_tokenizer(self, config: Any) -> None:
        tokenizer = self._read_tokenizer()
        limit = getattr(config, "max_position_embeddings", None) or _DEFAULT_MAX_LENGTH
        tokenizer.enable_truncation(min(int(self._settings.get("max_length", limit)), int(limit)))
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.padding = {"input_ids": float(config.pad_token_id or 0), "attention_mask": 0.0}

    def _read_tokenizer(self) -> Tokenizer:
        """From tokenizer.json, else from the vocabulary in a GGUF file of weights. Raises FailedPrecondition where there is neither."""
        path = self._pretrained.files / "tokenizer.json"
        if path.is_file():
            return Tokenizer.from_file(str(path))
        weights = self._pretrained.files / str(self._settings.get("weights", ""))
        if weights.suffix != ".gguf":
            raise FailedPrecondition("a text model needs tokenizer.json among `files`, or weights in GGUF", field="files")
        from tensorway_worker.engines.cut.gguf_source import gguf_tokenizer

        tokenizer: Tokenizer = gguf_tokenizer(weights)
        return tokenizer

    def preprocess(self, inputs: Inputs, parameters: Parameters) -> Inputs:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise ModelFailed("the tokeniser is not loaded")
        encodings = tokenizer.encode_batch_fast(_texts(inputs[self._text], self._text))
        longest = max((len(encoding) for encoding in encodings), default=1)
        ids = numpy.full((len(encodings), longest), int(self.padding["input_ids"]), numpy.int64)
        mask = numpy.zeros((len(encodings), longest), numpy.int64)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding)] = encoding.ids
            mask[row, : len(encoding)] = 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}

    def run(self, inputs: Inputs) -> Outputs:
        return self._step(inputs)

    def _whole(self, inputs: Inputs) -> Outputs:
        """The whole model's step."""
        result = self._model(**inputs, **self._task.arguments(inputs, self._accepted))
        return self._task.outputs(result, inputs, self._output)

    def postprocess(self, outputs: Outputs, parameters: Parameters) -> Outputs:
        return outputs

    def example(self, rows: int) -> Inputs | None:
        return None if self._model is None else self._example(rows, LENGTH)

    def _example(self, rows: int, length: int) -> Inputs:
        """Token ids of the vocabulary, a mask with a padded row; other inputs by the signature."""
        config = self._model.config
        limit = getattr(config, "max_position_embeddings", None) or _DEFAULT_MAX_LENGTH
        shape = (ROWS, "length")
        texts = [TensorSpec(name, DataType.INT64, shape) for name in ("input_ids", "attention_mask")]
        specs = texts if self._text else self._directory.spec.signature.inputs
        return made_up(specs, rows, min(length, int(limit)), {"input_ids": int(getattr(config, "vocab_size", 2))})

    def embedding(self, name: str) -> torch.nn.Module | None:
        if self._embeddings is not None:
            return self._embeddings.get(name)
        if self._model is None or name != self._model.main_input_name:
            return None
        try:
            found = self._model.get_input_embeddings()
        except NotImplementedError:
            # A model for pictures has none; such an input has derivatives itself.
            return None
        return found if isinstance(found, torch.nn.Embedding) else None

    def tokens(self, name: str, value: Value) -> Value | None:
        tokenizer = self._tokenizer
        if tokenizer is None or name != "input_ids":
            return None
        texts = numpy.empty(tuple(value.shape), dtype=object)
        for place, number in numpy.ndenumerate(numpy.asarray(value)):
            texts[place] = tokenizer.decode([int(number)], skip_special_tokens=False).encode()
        return texts

    def held_weights(self) -> Sequence[HeldWeight]:
        """See `tensorway_worker.engines.rewriting.Adaptable`."""
        return held(self._model, self._names or tied_names(self._model), self._slices, self._files().stored)

    def rewriting(self) -> Rewriting:
        """See `tensorway_worker.engines.rewriting.Adaptable`."""
        return self._files().rewriting()

    def _files(self) -> PretrainedFiles:
        return PretrainedFiles(self._pretrained, self._model, self._directory.path / FILES_DIR)

    def memory_bytes(self) -> int:
        return 0 if self._model is None else held_bytes(self._model)


def _not_loaded(inputs: Inputs) -> Outputs:
    raise ModelFailed("the model is not loaded")


def _texts(value: Value, name: str) -> list[str]:
    """The rows of a BYTES tensor as text. Raises InvalidInput naming the row that is no UTF-8."""
    texts: list[str] = []
    for row, element in enumerate(value):
        try:
            texts.append(element.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidInput(f"row {row} of {name} is not valid UTF-8: {error}", field=f"inputs.{name}[{row}]") from error
    return texts


def transformers_engine(directory: ModelDirectory, device: str, cut: Cut | None = None) -> TransformersEngine:
    """An engine for `directory`, or for a rank's part of it."""
    return TransformersEngine(directory, device, cut)
