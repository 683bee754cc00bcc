"""Which service a leader offers: batches, or answers of tokens."""

from __future__ import annotations

import asyncio

from tensorway.errors import FailedPrecondition
from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.port import Engine
from tensorway_worker.rank.codec import Codec
from tensorway_worker.rank.endpoint import Service
from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.facts import Facts
from tensorway_worker.rank.group import LinkedGroup
from tensorway_worker.rank.launch import RankLaunch
from tensorway_worker.rank.layout import Layouts
from tensorway_worker.rank.leader import Leader
from tensorway_worker.rank.solo import SoloGroup
from tensorway_worker.rank.step import BatchRunner
from tensorway_worker.rank.step_trace import StepTracing


def service_of(
    launch: RankLaunch,
    directory: ModelDirectory,
    engine: Engine,
    group: LinkedGroup | SoloGroup,
    runner: BatchRunner,
    executor: Executor,
    facts: Facts,
    tracing: StepTracing,
) -> Service:
    """The service of a leader whose group is ready; what it counts goes to `facts`. In the loop."""
    if directory.yaml.generation is not None:
        # Only here: it brings the libraries of its engine.
        from tensorway_worker.engines.generation.engine import GenerationEngine
        from tensorway_worker.rank.generating import Generations

        if not isinstance(engine, GenerationEngine):
            raise FailedPrecondition(f"engine {directory.yaml.engine} generates no tokens", field="generation")
        generations = Generations(directory, engine, group, executor, launch.epoch, tracing.tracer)
        facts.answers = generations.counts
        return generations
    codec = Codec(launch.model, launch.revision, Layouts(directory.spec.signature, runner.padding), runner.rules.check_names)
    return Leader(
        asyncio.get_running_loop(),
        executor,
        runner,
        codec,
        launch.epoch,
        stages_apart=engine.has_preprocess or engine.device != "cpu",
        finishes_apart=engine.has_postprocess,
        num_conductors=group.num_conductors,
        tracing=tracing,
    )
