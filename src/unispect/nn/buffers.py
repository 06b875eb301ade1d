"""Buffers whose size the data decides."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Learnt(nn.Module):
    """A module whose buffers take the size of what is loaded into them: a memory bank, a number of components."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            found = state_dict.get(prefix + name)
            if buffer is not None and found is not None and found.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(found.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
