"""A checkpoint's tensors under the names of the model that they are for, as transformers itself renames them when it loads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.weights_source import Slice, WeightsSource


class RenamedSource:
    """Another source's tensors under other names."""

    def __init__(self, source: WeightsSource, stored: Mapping[str, str], converted: Mapping[str, str]) -> None:
        """Args:
        stored: the model's name of a tensor -> the file's.
        converted: the model's name -> why no tensor of the file is it.
        """
        self._source = source
        self._stored = stored
        self._converted = converted

    def names(self) -> Collection[str]:
        return {**self._stored, **self._converted}.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._of(name))

    def load(self, name: str, part: Slice | None, dtype: torch.dtype | None, device: str) -> torch.Tensor:
        return self._source.load(self._of(name), part, dtype, device)

    def stored_name(self, name: str) -> str | None:
        """What the file calls the model's tensor `name`; None where it has none, or several that make it."""
        return self._stored.get(name)

    def _of(self, name: str) -> str:
        if name in self._converted:
            raise FailedPrecondition(self._converted[name], field="files")
        # A name that the file lacks is for the file to name.
        return self._stored.get(name, name)


def renamed_for(source: WeightsSource, model: Any) -> WeightsSource:
    """`source` under the parameter names of the transformers `model`.

    transformers' own rules are used: old spellings (`LayerNorm.gamma`), and the base model's prefix added or taken away. Parameters that
    it would make from several tensors of the file (the experts of a mixture) cannot be read by slices: `load` refuses them, saying so.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    stored: dict[str, str] = {}
    converted: dict[str, str] = {}
    for name in source.names():
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = name, None
        if pattern is None:
            stored[renamed] = name
        else:
            converted[renamed] = (
                f"{renamed} is put together from several tensors of the weights file ({name}, …), so it cannot be read by slices; save the "
                "model once with transformers' save_pretrained(…, save_original_format=False)"
            )
    return RenamedSource(source, stored, converted)
