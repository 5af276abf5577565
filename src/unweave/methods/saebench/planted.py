"""Activations with known features, and SAEs of which every measure's value is known.

G features with orthonormal directions (or unit ones in superposition, where G > D), firing rates by Zipf's law, and a
hierarchy: a child fires only where its parent does. x = sum_g f_g v_g. Three SAEs of it:

    perfect    a latent for each feature: f is recovered exactly where directions are orthonormal
    absorbing  a share q of parents' values moves into those children that absorb: their latent writes q of the parent
               too, and the parent's latent shows only 1 - q on them (q = 1: it is silent)
    random     directions that know nothing of the features (``baselines.random_directions``)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.errors import UnweaveError
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE

_APART = 1 << 29
"""added to the seed of directions, so that they are not what an SAE of this size begins with"""
_SILENT = 1e-5
"""how much lower latents are than their features, so that rounding makes none fire"""


@dataclass(frozen=True)
class Planted:
    """Features: ``directions`` [G, D] of unit length, ``parents`` int64 [G] (-1: none), ``rates`` [G] of firing where
    the parent does (anywhere, without one)."""

    directions: Tensor
    parents: Tensor
    rates: Tensor

    @classmethod
    def drawn(
        cls, parents: Sequence[int], width: int, *, zipf: float = 1.0, rate: float = 0.5, seed: int = 0
    ) -> Planted:
        """Random directions; the r-th feature fires with ``rate`` r^-zipf. A parent must come before its children."""
        n, generator = len(parents), torch.Generator().manual_seed(_APART + seed)
        if any(parent >= child for child, parent in enumerate(parents)):
            raise UnweaveError("a feature's parent must come before it", where="parents")
        rows = torch.randn(n, width, generator=generator)
        directions = torch.linalg.qr(rows.T).Q.T if n <= width else F.normalize(rows, dim=1)
        return cls(directions.contiguous(), torch.tensor(parents), rate * torch.arange(1, n + 1).float() ** -zipf)

    @classmethod
    def zipfian(
        cls, features: int, width: int, *, children: float = 0.5, zipf: float = 0.5, rate: float = 0.5, seed: int = 0
    ) -> Planted:
        """As ``drawn``, with a share of the features, the rarest, children of the others in turn."""
        parents = features - round(children * features)
        tree = [-1] * parents + [i % max(1, parents) for i in range(features - parents)]
        return cls.drawn(tree, width, zipf=zipf, rate=rate, seed=seed)

    def sample(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Activations [n, D] and the features in them [n, G], of value 1 where they fire."""
        generator = torch.Generator().manual_seed(seed)
        fires = torch.rand(n, len(self.rates), generator=generator) < self.rates
        for child, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                fires[:, child] &= fires[:, parent]
        f = fires.float()
        return f @ self.directions, f

    def sae(self, absorbing: Sequence[int] = (), share: float = 1.0) -> SAE:
        """The perfect SAE, or one in which the children ``absorbing`` take ``share`` of their parent's value."""
        encoder, decoder = self.directions.clone(), self.directions.clone()
        for child in absorbing:
            parent = int(self.parents[child])
            if parent < 0:
                raise UnweaveError(f"feature {child} has no parent to absorb", where="absorbing")
            encoder[parent] -= share * self.directions[child]
            decoder[child] += share * self.directions[parent]
        length = decoder.norm(dim=1, keepdim=True)
        encoder, decoder = encoder * length, decoder / length
        bias = torch.full((len(encoder),), -_SILENT)
        return SAE(encoder.T, bias, decoder, torch.zeros(encoder.shape[1]), ReLU())
