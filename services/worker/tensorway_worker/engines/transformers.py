"""Engine `transformers`: embedding and classification models of the transformers library.

Settings:
    task: `embedding` (mean pooling over attended tokens, L2-normalised) or `classification` (logits).
    directory: folder under files/ that holds config.json, model.safetensors and tokenizer.json (default: files/ itself).
    max_length: most tokens of a text; the rest is cut off (default: what the model can hold).
    architecture, config, seed: instead of files, a class of transformers with its default configuration (updated by `config`) and random
        weights from `seed`; `weights` may then name a weights file.

A single BYTES input is text and goes through the tokeniser; any other inputs are handed to the model under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy
import torch
import transformers
from tokenizers import Tokenizer

from tensorway.errors import FailedPrecondition, ModelFailed
from tensorway.model import Inputs, InvalidInput, Outputs, Parameters, Value
from tensorway.model_directory import FILES_DIR, ModelDirectory
from tensorway.tensors import DataType
from tensorway_worker.engines.weights import DTYPES, load_weights, module_bytes

_AUTO: Final = {"embedding": "AutoModel", "classification": "AutoModelForSequenceClassification"}
#: What a model without a limit of its own gets.
_DEFAULT_MAX_LENGTH: Final = 512


class TransformersEngine:
    """One transformers model; see the module's docstring for its settings."""

    has_postprocess = False

    def __init__(self, directory: ModelDirectory, device: str) -> None:
        self.device = device
        self._directory = directory
        self._settings = directory.yaml.settings
        self._task = self._settings.get("task")
        if self._task not in _AUTO:
            raise FailedPrecondition(f"settings.task must be one of {', '.join(_AUTO)}, got {self._task!r}", field="settings.task")
        signature = directory.spec.signature
        texts = [spec.name for spec in signature.inputs if spec.dtype is DataType.BYTES]
        if texts and len(signature.inputs) > 1:
            raise FailedPrecondition("a text model takes one BYTES input and nothing else", field="inputs")
        if len(signature.outputs) != 1:
            raise FailedPrecondition(f"task {self._task} has exactly one output", field="outputs")
        self._text = texts[0] if texts else ""
        self._output = signature.outputs[0].name
        self.has_preprocess = bool(texts)
        # The tokeniser's Rust code lets go of the interpreter and is safe to share between threads.
        self.preprocess_threads = 2 if texts else 1
        self.padding: Mapping[str, float] = {}
        self._tokenizer: Tokenizer | None = None
        self._model: torch.nn.Module | None = None

    @property
    def _files(self) -> Path:
        return self._directory.path / FILES_DIR / str(self._settings.get("directory", ""))

    def load(self) -> None:
        for declared in self._directory.missing_files():
            raise FailedPrecondition(f"{declared.path} is not there; run `tensorway models fetch` first", field="files")
        # What a rank prints goes to its node's log, where a progress bar says nothing.
        transformers.utils.logging.disable_progress_bar()
        architecture = self._settings.get("architecture")
        model = self._made(str(architecture)) if architecture else self._pretrained()
        self._model = model.eval().requires_grad_(False).to(self.device)
        if self._text:
            self._load_tokenizer(model.config)

    def _pretrained(self) -> Any:
        dtype = DTYPES.get(self._directory.yaml.weights_dtype)
        kind = getattr(transformers, _AUTO[str(self._task)])
        extra = {} if dtype is None else {"dtype": dtype}
        return kind.from_pretrained(self._files, local_files_only=True, use_safetensors=True, **extra)

    def _made(self, architecture: str) -> Any:
        kind = getattr(transformers, architecture, None)
        if kind is None or not hasattr(kind, "config_class"):
            raise FailedPrecondition(f"settings.architecture: transformers has no model {architecture!r}", field="settings.architecture")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self._settings.get("seed", 0)))
            model = kind(kind.config_class(**self._settings.get("config", {})))
        weights = self._settings.get("weights")
        dtype = self._directory.yaml.weights_dtype
        if weights:
            unpickle = self._settings.get("unpickle", ())
            model.load_state_dict(load_weights(self._directory.file(str(weights)), "cpu", "keep", unpickle))
        return model.to(DTYPES[dtype]) if dtype in DTYPES else model

    def _load_tokenizer(self, config: Any) -> None:
        tokenizer = Tokenizer.from_file(str(self._files / "tokenizer.json"))
        limit = getattr(config, "max_position_embeddings", None) or _DEFAULT_MAX_LENGTH
        tokenizer.enable_truncation(min(int(self._settings.get("max_length", limit)), int(limit)))
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.padding = {"input_ids": float(config.pad_token_id or 0), "attention_mask": 0.0}

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
        if self._model is None:
            raise ModelFailed("the model is not loaded")
        result = self._model(**inputs)
        if self._task == "classification":
            return {self._output: result.logits}
        return {self._output: _mean_pooled(result.last_hidden_state, inputs["attention_mask"])}

    def postprocess(self, outputs: Outputs, parameters: Parameters) -> Outputs:
        return outputs

    def example(self, rows: int) -> Inputs | None:
        return None

    def embedding(self, name: str) -> torch.nn.Module | None:
        return None

    def memory_bytes(self) -> int:
        return 0 if self._model is None else module_bytes(self._model)


def _texts(value: Value, name: str) -> list[str]:
    """The rows of a BYTES tensor as text. Raises InvalidInput naming the row that is no UTF-8."""
    texts: list[str] = []
    for row, element in enumerate(value):
        try:
            texts.append(element.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidInput(f"row {row} of {name} is not valid UTF-8: {error}", field=f"inputs.{name}[{row}]") from error
    return texts


def _mean_pooled(hidden: torch.Tensor, mask: Any) -> torch.Tensor:
    """Mean of the attended tokens' states, of length 1. hidden [rows, length, width], mask [rows, length] -> [rows, width]."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    summed = (hidden * weights).sum(dim=1)
    return torch.nn.functional.normalize(summed / weights.sum(dim=1).clamp(min=1e-9), p=2.0, dim=1)


def transformers_engine(directory: ModelDirectory, device: str) -> TransformersEngine:
    """An engine for `directory`."""
    return TransformersEngine(directory, device)
