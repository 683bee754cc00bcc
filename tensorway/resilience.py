"""What a model's author may say about failures and load: `hedging`, `fallback` and `scaling` of model.yaml.

All three are off unless the author asks: a hedge costs the devices a second answer, a fallback answers with another network, and scaling
starts and ends processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


@dataclass(frozen=True, slots=True)
class Hedging:
    """When a request that is late is sent to a second group, too; the first answer counts (Dean and Barroso, "The tail at scale", 2013)."""

    #: A request is late once it has taken longer than this share of recent ones.
    quantile: float = 0.95
    #: However quick the others were, none is hedged before this, milliseconds.
    min_delay_ms: float = 1.0
    #: Most hedges as a share of requests.
    max_share: float = 0.05


@dataclass(frozen=True, slots=True)
class Fallback:
    """Who answers when this model cannot: no group lives, its queue is full, or the answer would come too late."""

    model: str
    #: Full revision, or a unique prefix of one; empty: the one that serves.
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Between which numbers of replicas the mesh may choose by itself."""

    min_replicas: int
    max_replicas: int
    #: Share of the time that a replica should compute.
    target_utilisation: float = 0.7
    #: Seconds without a request after which the last replica may end (where `min_replicas` is 0), and before any other ends.
    idle_s: float = 300.0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HedgingYaml(_Strict):
    """`hedging:` of model.yaml; see `Hedging`."""

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.95
    min_delay_ms: Annotated[float, Field(ge=0, le=60_000)] = 1.0
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.05

    @property
    def rule(self) -> Hedging:
        return Hedging(self.quantile, self.min_delay_ms, self.max_share)


class FallbackYaml(_Strict):
    """`fallback:` of model.yaml; see `Fallback`."""

    model: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(pattern=r"^([0-9a-f]{8,64})?$")] = ""

    @property
    def rule(self) -> Fallback:
        return Fallback(self.model, self.revision)


class ScalingYaml(_Strict):
    """`scaling:` of model.yaml; see `Scaling`."""

    min_replicas: Annotated[int, Field(ge=0, le=1024)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1024)]
    target_utilisation: Annotated[float, Field(gt=0, le=1)] = 0.7
    idle_s: Annotated[float, Field(gt=0)] = 300.0

    @model_validator(mode="after")
    def _consistent(self) -> ScalingYaml:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, more than max_replicas, which is {self.max_replicas}")
        return self

    @property
    def rule(self) -> Scaling:
        return Scaling(self.min_replicas, self.max_replicas, self.target_utilisation, self.idle_s)
