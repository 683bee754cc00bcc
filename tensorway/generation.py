"""What model.yaml says of a model that generates tokens, and what the mesh needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """Published with the revision."""

    #: Answers that one group makes at once.
    max_sequences: int
    #: Answers that may wait in one orchestrator before RESOURCE_EXHAUSTED.
    max_waiting: int


class SamplingDefaultsYaml(BaseModel):
    """What a caller gets who does not say otherwise; see `Sampling` and `Stop` of inference.proto."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    #: 0: as many as the context holds.
    max_tokens: Annotated[int, Field(ge=0)] = 0


class GenerationYaml(BaseModel):
    """The key `generation` of model.yaml: its presence makes the model one that generates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Answers that a group makes at once; more wait.
    max_sequences: Annotated[int, Field(ge=1, le=4096)] = 64
    #: Answers that may wait in one orchestrator.
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    #: Tokens of prompt and answer together; 0: as many as the model was made for.
    max_context: Annotated[int, Field(ge=0)] = 0
    #: Memory of the keys and values of all answers, MiB, over all ranks of a group. An answer that finds no room waits.
    kv_cache_mb: Annotated[int, Field(ge=1)] = 1024
    #: Tokens in one block of that memory.
    block_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    #: Most tokens in one step: one for each running answer, and what is left for pieces of new prompts.
    step_tokens: Annotated[int, Field(ge=1)] = 256
    defaults: SamplingDefaultsYaml = SamplingDefaultsYaml()

    @property
    def limits(self) -> GenerationLimits:
        """What of it is published."""
        return GenerationLimits(self.max_sequences, self.max_waiting)
