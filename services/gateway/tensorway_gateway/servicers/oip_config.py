"""A model's metadata, configuration and statistics in the words of the Open Inference Protocol v2."""

from __future__ import annotations

from typing import Final

from tensorway.compat import grpc_service_pb2 as oip
from tensorway.compat import model_config_pb2 as config
from tensorway.signature import TensorSpec
from tensorway.tensors import DataType
from tensorway_gateway.models import Model, Revision
from tensorway_gateway.requests import MAX_PRIORITY, MIN_PRIORITY
from tensorway_gateway.statistics import RevisionCounts, Statistics

_CONFIG_DTYPES: Final = {
    DataType.BOOL: config.TYPE_BOOL,
    DataType.UINT8: config.TYPE_UINT8,
    DataType.UINT16: config.TYPE_UINT16,
    DataType.UINT32: config.TYPE_UINT32,
    DataType.UINT64: config.TYPE_UINT64,
    DataType.INT8: config.TYPE_INT8,
    DataType.INT16: config.TYPE_INT16,
    DataType.INT32: config.TYPE_INT32,
    DataType.INT64: config.TYPE_INT64,
    DataType.FP16: config.TYPE_FP16,
    DataType.BF16: config.TYPE_BF16,
    DataType.FP32: config.TYPE_FP32,
    DataType.FP64: config.TYPE_FP64,
    DataType.BYTES: config.TYPE_STRING,
}
_PLATFORMS: Final = {
    "torchscript": "pytorch_libtorch",
    "export": "pytorch_export",
    "python": "pytorch_python",
    "transformers": "pytorch_transformers",
}
_BACKEND: Final = "tensorway"
_PRIORITY_LEVELS: Final = MAX_PRIORITY - MIN_PRIORITY + 1


def write_metadata(model: Model, revision: Revision) -> oip.ModelMetadataResponse:
    """Shapes include the batch dimension; -1 stands for what varies."""
    spec = revision.spec
    tensor = oip.ModelMetadataResponse.TensorMetadata
    return oip.ModelMetadataResponse(
        name=spec.model,
        versions=[candidate.spec.version for candidate in model.revisions],
        platform=_PLATFORMS.get(spec.engine, spec.engine),
        inputs=[tensor(name=item.name, datatype=item.dtype.name, shape=item.extents) for item in spec.signature.inputs],
        outputs=[tensor(name=item.name, datatype=item.dtype.name, shape=item.extents) for item in spec.signature.outputs],
    )


def write_config(model: Model, revision: Revision) -> config.ModelConfig:
    """Dims leave the batch dimension out where max_batch_size says that there is one."""
    spec = revision.spec
    is_batchable = spec.signature.is_batchable
    written = config.ModelConfig(
        name=spec.model,
        platform=_PLATFORMS.get(spec.engine, spec.engine),
        backend=_BACKEND,
        max_batch_size=spec.batching.max_rows if is_batchable else 0,
        input=[
            config.ModelInput(name=item.name, data_type=_CONFIG_DTYPES[item.dtype], dims=_dims(item, is_batchable))
            for item in spec.signature.inputs
        ],
        output=[
            config.ModelOutput(name=item.name, data_type=_CONFIG_DTYPES[item.dtype], dims=_dims(item, is_batchable))
            for item in spec.signature.outputs
        ],
        instance_group=[config.ModelInstanceGroup(name=spec.model, count=model.num_replicas, kind=config.ModelInstanceGroup.KIND_AUTO)],
        model_transaction_policy=config.ModelTransactionPolicy(decoupled=spec.generation is not None),
    )
    written.parameters["revision"].string_value = spec.revision
    written.parameters["engine"].string_value = spec.engine
    if is_batchable:
        written.dynamic_batching.CopyFrom(config.ModelDynamicBatching(
            max_queue_delay_microseconds=int(spec.batching.max_delay_ms * 1000),
            priority_levels=_PRIORITY_LEVELS,
            default_priority_level=MAX_PRIORITY + 1,
            default_queue_policy=config.ModelQueuePolicy(
                default_timeout_microseconds=int(spec.default_timeout_s * 1e6), allow_timeout_override=True,
                max_queue_size=min(spec.batching.max_queue_rows, 2**32 - 1),
            ),
        ))
    return written


def write_statistics(revision: Revision, statistics: Statistics) -> oip.ModelStatistics:
    """Counts of this gateway. Waiting at the leader counts as queue; all preparing at the leader as compute_input."""
    spec = revision.spec
    counts = statistics.revision(spec.model, spec.revision)
    return oip.ModelStatistics(
        name=spec.model,
        version=spec.version,
        last_inference=int(counts.last_s * 1000),
        inference_count=counts.num_rows,
        execution_count=counts.num_steps,
        inference_stats=_inference_stats(counts),
        batch_stats=[
            oip.InferBatchStatistics(
                batch_size=rows,
                compute_input=_duration(batch.num_steps, batch.prepare_us),
                compute_infer=_duration(batch.num_steps, batch.step_us),
                compute_output=_duration(batch.num_steps, 0),
            )
            for rows, batch in sorted(counts.batches.items())
        ],
    )


def _inference_stats(counts: RevisionCounts) -> oip.InferStatistics:
    succeeded = counts.num_succeeded
    return oip.InferStatistics(
        success=_duration(succeeded, counts.succeeded_us),
        fail=_duration(counts.num_failed, counts.failed_us),
        queue=_duration(succeeded, counts.queue_us),
        compute_input=_duration(succeeded, counts.prepare_us),
        compute_infer=_duration(succeeded, counts.step_us),
        compute_output=_duration(succeeded, 0),
    )


def _duration(count: int, total_us: int) -> oip.StatisticDuration:
    return oip.StatisticDuration(count=count, ns=total_us * 1000)


def _dims(spec: TensorSpec, is_batchable: bool) -> tuple[int, ...]:
    """The protocol has no scalar dims: a shape of `rows` alone is one element a row."""
    dims = spec.extents[1:] if is_batchable else spec.extents
    return dims or (1,)
