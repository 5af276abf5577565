"""Which tokens count: the policy that a training run states, that its SAE carries, and that every later use follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.fields import Fields


@dataclass(frozen=True)
class TokenPolicy:
    """Tokens that an SAE was trained on, and outside of which its latents mean nothing.

    Padding never counts. Tokens with an id in ``exclude_ids`` (the special tokens, usually) do not count, nor do norm
    outliers such as attention sinks, whose activation is longer than ``max_norm`` (trap 7): they would swamp the loss,
    and editing them breaks the model.
    """

    exclude_ids: tuple[int, ...] = ()
    max_norm: float | None = None

    def keep(self, x: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """True at the tokens that count, bool [...], for activations x [..., D], ids and mask [...]."""
        keep = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        if self.exclude_ids:
            if ids is None:
                raise UnweaveError("this policy excludes token ids, but none were given", remedy="pass ids=")
            keep = keep & ~torch.isin(ids, torch.tensor(self.exclude_ids, device=ids.device))
        if self.max_norm is not None:
            keep = keep & (x.norm(dim=-1) <= self.max_norm)
        return keep

    @classmethod
    def common(cls, policies: Iterable[TokenPolicy]) -> Self:
        """The policy by which counts what counts by all of ``policies``."""
        some = list(policies)
        norms = [policy.max_norm for policy in some if policy.max_norm is not None]
        return cls(tuple(sorted({i for policy in some for i in policy.exclude_ids})), min(norms, default=None))

    def to_dict(self) -> dict[str, Any]:
        return {"exclude_ids": list(self.exclude_ids), "max_norm": self.max_norm}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | Fields) -> Self:
        """The policy in a file. Raises UnweaveError for invalid ids, and for a norm that is not a number above 0."""
        fields = values if isinstance(values, Fields) else Fields(values, "", "policy")
        return cls(fields.integers("exclude_ids", most=1 << 31), fields.number("max_norm", above=0))
