"""A model directory: `model.yaml`, optional `model.py`, and files that are either there or fetched by `tensorway models fetch`.

The schema below is the whole of model.yaml, once TorchServe's keys have been translated (`torchserve_keys.py`). `load_directory` reads
one directory and names every bad field at once; the **revision** is a SHA-256 over model.yaml, every file beside it and the declared hash
of every declared file, so two equal directories are one revision.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tensorway.errors import FailedPrecondition
from tensorway.generation import GenerationYaml
from tensorway.resilience import FallbackYaml, HedgingYaml, ScalingYaml
from tensorway.signature import ROWS, Batching, Padding, RevisionSpec, Signature, TensorSpec
from tensorway.tensors import DataType
from tensorway.torchserve_keys import translated

MODEL_FILE = "model.yaml"
#: What a model may be called.
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
#: Where declared files land inside the directory; git-ignored, and not hashed (their declared SHA-256 is).
FILES_DIR = "files"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorYaml(_Strict):
    """`{name: input_ids, dtype: INT64, shape: [rows, length]}`."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    dtype: str
    shape: tuple[int | str, ...]

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DataType.__members__:
            raise ValueError(f"{value!r} is not one of {', '.join(DataType.__members__)}")
        return value

    @field_validator("shape")
    @classmethod
    def _good_extents(cls, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for extent in value:
            if isinstance(extent, int) and extent < 0:
                raise ValueError("use a name (e.g. length) for a dimension that varies, not a negative extent")
        if ROWS in value[1:]:
            raise ValueError("`rows` may only be the first dimension")
        return value


class BatchingYaml(_Strict):
    """How requests are joined; see `tensorway.signature.Batching`."""

    max_rows: Annotated[int, Field(ge=1, le=65536)] = 32
    max_delay_ms: Annotated[float, Field(ge=0, le=60_000)] = 0.0
    max_queue_rows: Annotated[int, Field(ge=1)] = 4096
    oversize: Literal["refuse", "alone"] = "refuse"
    #: Input name -> value of the added elements.
    padding: dict[str, float] = {}


class FileYaml(_Strict):
    """One declared file. `source` is a path, any fsspec URL, or `pypi://PROJECT==VERSION/PATH/IN/WHEEL`."""

    path: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        parts = Path(value).parts
        if Path(value).is_absolute() or ".." in parts:
            raise ValueError("must stay inside the model's files directory")
        return value


class ParallelYaml(_Strict):
    """How many ranks hold one copy: pipeline stages x tensor shards, on one node or several; or one rank with several devices."""

    pipeline: Annotated[int, Field(ge=1, le=1024)] = 1
    tensor: Annotated[int, Field(ge=1, le=1024)] = 1
    #: Nodes that the ranks are spread over, in equal consecutive blocks.
    nodes: Annotated[int, Field(ge=1)] = 1
    #: Micro-batches that a batch goes through the pipeline as; 0 lets Tensorway choose.
    micro_batches: Annotated[int, Field(ge=0)] = 0
    #: Devices that one rank manages by itself; 0: the group is no such group.
    custom: Annotated[int, Field(ge=0)] = 0
    #: When a cut group's outputs are compared with the uncut model's at load.
    verify: Literal["auto", "always", "off"] = "auto"

    @field_validator("verify", mode="before")
    @classmethod
    def _unquoted_off(cls, value: object) -> object:
        """YAML reads an unquoted `off` as false."""
        return "off" if value is False else value

    @model_validator(mode="after")
    def _consistent(self) -> ParallelYaml:
        if self.world_size % self.nodes:
            raise ValueError(
                f"nodes is {self.nodes}, which does not divide pipeline x tensor = {self.world_size} ranks into equal blocks"
            )
        if self.custom and self.world_size > 1:
            raise ValueError("custom is one rank that manages its devices by itself; leave pipeline and tensor out, or custom")
        return self

    @property
    def world_size(self) -> int:
        """Ranks of the group."""
        return self.pipeline * self.tensor


class ModelYaml(_Strict):
    """model.yaml."""

    name: Annotated[str, Field(pattern=MODEL_NAME)]
    description: str = ""
    version: str = "1"
    engine: Literal["python", "torchscript", "export", "transformers"]
    inputs: Annotated[tuple[TensorYaml, ...], Field(min_length=1)]
    outputs: Annotated[tuple[TensorYaml, ...], Field(min_length=1)]
    batching: BatchingYaml = BatchingYaml()
    #: Set: the model generates tokens; see `tensorway.generation`.
    generation: GenerationYaml | None = None
    #: Set: late requests are sent to a second group, too.
    hedging: HedgingYaml | None = None
    #: Who answers when this model cannot.
    fallback: FallbackYaml | None = None
    #: Set: the mesh chooses the number of replicas; `replicas` is what it begins with.
    scaling: ScalingYaml | None = None
    files: tuple[FileYaml, ...] = ()
    parallel: ParallelYaml = ParallelYaml()
    replicas: Annotated[int, Field(ge=0)] = 1
    #: Torch threads of a rank; 0 = the cores of the node shared evenly among its ranks.
    threads: Annotated[int, Field(ge=0)] = 0
    #: `cpu`, `cuda` or `auto` (CUDA where there is a device).
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: Element type of floating-point weights; `keep` leaves them as stored.
    weights_dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    #: Most memory that a rank may use, MiB; 0 = what the machine, its control group or the device has. A batch that is predicted to need
    #: more is split, and a request that alone needs more is refused.
    memory_limit_mb: Annotated[int, Field(ge=0)] = 0
    startup_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    default_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    #: Settings of the engine or of the author's own model.py.
    settings: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> ModelYaml:
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [spec.name for spec in specs]
            if len(set(names)) != len(names):
                raise ValueError(f"{kind}: names must be unique, got {names}")
        if self.generation is not None and self.engine != "transformers":
            raise ValueError(f"generation: engine {self.engine} generates no tokens; transformers does")
        if self.fallback is not None and self.fallback.model == self.name and not self.fallback.revision:
            raise ValueError("fallback: a model cannot answer for itself; name another model, or another revision of this one")
        if self.generation is not None and self.hedging is not None:
            raise ValueError("hedging: a model that generates is not hedged; a stream outlives its group as it is")
        scaling = self.scaling
        if scaling is not None and not scaling.min_replicas <= self.replicas <= scaling.max_replicas:
            raise ValueError(f"replicas: {self.replicas} is not within scaling's {scaling.min_replicas} to {scaling.max_replicas}")
        by_name = {spec.name: spec for spec in self.inputs}
        for name in self.batching.padding:
            spec = by_name.get(name)
            if spec is None or not any(isinstance(extent, str) and extent != ROWS for extent in spec.shape):
                raise ValueError(f"batching.padding.{name}: no input of that name has a varying dimension besides rows")
            if spec.dtype == "BYTES":
                raise ValueError(f"batching.padding.{name}: BYTES cannot be padded")
        return self


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """One model directory as found on disk."""

    path: Path
    yaml: ModelYaml
    spec: RevisionSpec

    def file(self, path: str) -> Path:
        """Where the declared file `path` lies, or will lie once fetched."""
        return self.path / FILES_DIR / path

    def missing_files(self) -> tuple[FileYaml, ...]:
        """Declared files that are not there yet."""
        return tuple(file for file in self.yaml.files if not self.file(file.path).is_file())


def load_directory(path: Path) -> ModelDirectory:
    """Reads `path/model.yaml`. Raises FailedPrecondition naming the file and every bad field."""
    source = path / MODEL_FILE
    try:
        document = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FailedPrecondition(f"{source}: cannot be read: {error}", field=str(source)) from error
    if not isinstance(document, dict):
        raise FailedPrecondition(f"{source}: must be a mapping with name, engine, inputs and outputs", field=str(source))
    try:
        model = ModelYaml.model_validate(translated(document))
    except FailedPrecondition as error:
        raise FailedPrecondition(f"{source}: {error.message}", field=error.field) from error
    except ValidationError as error:
        bad = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'model.yaml'}: {item['msg']}" for item in error.errors()
        )
        raise FailedPrecondition(f"{source}: {bad}", field=str(source)) from error
    return ModelDirectory(path, model, _spec(model, revision_of(path, model)))


def find_directories(models_dir: Path) -> tuple[ModelDirectory, ...]:
    """Every model directory directly under `models_dir`, by name. Raises FailedPrecondition where two share a name."""
    if not models_dir.is_dir():
        raise FailedPrecondition(f"{models_dir}: no such directory; give the directory that holds your model directories")
    found = tuple(load_directory(path.parent) for path in sorted(models_dir.glob(f"*/{MODEL_FILE}")))
    names = [directory.yaml.name for directory in found]
    for name in set(names):
        if names.count(name) > 1:
            raise FailedPrecondition(f"{models_dir}: more than one directory is named {name!r} in its model.yaml")
    return found


def revision_of(path: Path, model: ModelYaml) -> str:
    """Content hash of a model directory: 64 hex digits."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if relative.parts[0] == FILES_DIR or "__pycache__" in relative.parts or relative.name.startswith(".") or not file.is_file():
            continue
        digest.update(f"{relative.as_posix()}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    for declared in sorted(model.files, key=lambda item: item.path):
        digest.update(f"{FILES_DIR}/{declared.path}\0{declared.sha256}\n".encode())
    return digest.hexdigest()


def _tensor(spec: TensorYaml) -> TensorSpec:
    return TensorSpec(spec.name, DataType[spec.dtype], spec.shape)


def _spec(model: ModelYaml, revision: str) -> RevisionSpec:
    return RevisionSpec(
        model=model.name,
        revision=revision,
        version=model.version,
        description=model.description,
        engine=model.engine,
        signature=Signature(tuple(map(_tensor, model.inputs)), tuple(map(_tensor, model.outputs))),
        batching=Batching(
            max_rows=model.batching.max_rows,
            max_delay_ms=model.batching.max_delay_ms,
            max_queue_rows=model.batching.max_queue_rows,
            oversize=model.batching.oversize,
            padding=tuple(Padding(name, value) for name, value in sorted(model.batching.padding.items())),
        ),
        num_replicas=model.replicas,
        default_timeout_s=model.default_timeout_s,
        generation=None if model.generation is None else model.generation.limits,
        hedging=None if model.hedging is None else model.hedging.rule,
        fallback=None if model.fallback is None else model.fallback.rule,
        scaling=None if model.scaling is None else model.scaling.rule,
    )
