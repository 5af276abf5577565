"""What an SAE can do to an activation while the model runs. Edits cost what they touch.

    clamp              x + sum_j (c_j - f_j(x)) d_j
    add                x + sum_j c_j d_j
    ablate (zero)      x - sum_j f_j(x) d_j
    ablate (span)      x - Q Q^T x, with Q an orthonormal basis of the latents' directions
    reconstruct        decode(encode(x))

The part that the SAE does not explain stays in all but the last, because only differences are added (trap 37). An edit
of S latents needs S encoder rows and S decoder rows; a TopK SAE must also find which latents win, and does that once.
Where inputs are normalised token by token, a latent's part is scaled by the token's own factor (``input_norm``).
By default an edit leaves alone the tokens that the SAE was not trained on: padding, special tokens, attention sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.taps import At
from unweave.sae.activations import Identity, JumpReLU, TopK

if TYPE_CHECKING:
    from unweave.lm.model import LM
    from unweave.sae.module import SAE

Where = Literal["policy", "all"]
"""policy: only the tokens that the SAE was trained on; all: every token that is not padding"""

_COUNT_UP_TO = 4
"""with so few latents, counting the winners above each is cheaper than finding a row's k-th largest"""


class Subset:
    """A few latents of an SAE: ``latents`` [S], ``W_enc`` [d_in, S], ``b_enc`` [S], ``directions`` [S, d_out]."""

    latents: Tensor
    W_enc: Tensor
    b_enc: Tensor

    def __init__(self, sae: SAE, latents: Sequence[int]) -> None:
        """Raises UnweaveError for latents that do not exist or are named twice."""
        chosen = [int(j) for j in latents]
        for j in chosen:
            if not 0 <= j < sae.d_sae:
                raise UnweaveError(f"latent {j} does not exist", where=repr(sae), remedy=f"use 0 to {sae.d_sae - 1}")
        if len(set(chosen)) != len(chosen):
            raise UnweaveError("a latent is named twice", remedy="name each latent once")
        self.sae = sae
        self.latents = torch.tensor(chosen, dtype=torch.int64, device=sae.W_enc.device)
        self.W_enc = sae.W_enc[:, self.latents].contiguous()
        self.b_enc = sae.b_enc[self.latents]
        self._rows = sae.W_dec[self.latents]

    @property
    def directions(self) -> Tensor:
        """What value 1 of each latent adds to the activation, [S, d_out].

        Raises UnweaveError where that differs from token to token (``writes`` knows), and for an SAE that only encodes.
        """
        self.sae.require_decoder()
        if self.sae.input_norm is not None:
            raise UnweaveError(
                f"this SAE normalises every token's input ({self.sae.input_norm}), so its latents' directions have "
                "another length at every token",
                where=repr(self.sae),
                remedy="edit with clamp, add or ablate, which scale them; other uses need an SAE without it",
            )
        return self._rows

    def span(self) -> Tensor:
        """Orthonormal rows that span the latents' directions, whatever their length."""
        self.sae.require_decoder()
        return orthonormal_basis(self._rows)

    def writes(self, values: Tensor, source: Tensor) -> Tensor:
        """What ``values`` [..., S] of the latents add to the activation [..., d_out] of tokens that read ``source``."""
        self.sae.require_decoder()
        normal = self.sae.normalised(source)
        written = values @ self._rows
        return written if normal is None else written * normal.scale

    def encode(self, x: Tensor) -> Tensor:
        """These latents' values [..., S]: equal to ``sae.encode(x)[..., latents]``."""
        activation = self.sae.activation
        if not isinstance(activation, TopK):
            normal = self.sae.normalised(x)
            x = x.to(self.W_enc.dtype) if normal is None else normal.x
            pre = x @ self.W_enc + self.b_enc
            if isinstance(activation, Identity):
                return pre
            if isinstance(activation, JumpReLU):
                return torch.relu(pre) * (pre > activation.threshold[self.latents])
            return torch.relu(pre)
        everything = self.sae.pre(x)
        pre = everything[..., self.latents]
        if len(self.latents) <= _COUNT_UP_TO:
            columns = pre.unbind(-1)
            above = torch.stack([(everything > z.unsqueeze(-1)).sum(-1) for z in columns], -1)
            wins = above < activation.k
        else:
            wins = pre >= everything.topk(activation.k, dim=-1).values[..., -1:]
        return torch.relu(pre) * wins


@dataclass(frozen=True)
class Edit:
    """An edit that knows its site: pass it to ``lm.taps(edit=...)`` or ``lm.generate(edit=...)``."""

    name: str
    sae: SAE
    change: Callable[[Tensor, Tensor], Tensor]
    """(what the SAE reads, what it writes to) -> the new value of the latter"""
    where: Where

    @property
    def site(self) -> Site:
        if self.sae.write is None:
            raise UnweaveError("this SAE's file named no site", remedy='name it: sae.at("resid_post.9")')
        return self.sae.write

    @property
    def needs(self) -> tuple[Site, ...]:
        return () if self.sae.read == self.sae.write or self.sae.read is None else (self.sae.read,)

    def verify(self, lm: LM) -> None:
        """Refuses a model that is not the SAE's."""
        self.sae.verify(lm)

    def __call__(self, x: Tensor, at: At) -> Tensor | None:
        source = at.read[self.needs[0]] if self.needs else x
        new = self.change(source, x)
        if self.where == "policy":
            kept = self.sae.policy.keep(source, at.ids, at.mask)
        else:
            kept = at.mask
        return torch.where(kept.unsqueeze(-1), new, x)

    def __repr__(self) -> str:
        return f"{self.name} at {self.sae.write}"


def _vector(sae: SAE, values: Mapping[int, float]) -> Tensor:
    if not values:
        raise UnweaveError("no latents were named", remedy="pass {latent: value}")
    return torch.tensor(list(values.values()), dtype=sae.W_dec.dtype, device=sae.W_dec.device)


def clamp(sae: SAE, values: Mapping[int, float], where: Where = "policy") -> Edit:
    """See ``SAE.clamp``."""
    sae.require_decoder()
    target, subset = _vector(sae, values), Subset(sae, list(values))

    def change(source: Tensor, x: Tensor) -> Tensor:
        return x + subset.writes(target - subset.encode(source), source).to(x.dtype)

    return Edit(f"clamp {dict(values)}", sae, change, where)


def add(sae: SAE, values: Mapping[int, float], where: Where = "policy") -> Edit:
    """See ``SAE.add``."""
    sae.require_decoder()
    amounts, subset = _vector(sae, values), Subset(sae, list(values))

    def change(source: Tensor, x: Tensor) -> Tensor:
        return x + subset.writes(amounts, source).to(x.dtype)

    return Edit(f"add {dict(values)}", sae, change, where)


def ablate(sae: SAE, latents: Iterable[int], mode: Literal["zero", "span"] = "zero", where: Where = "policy") -> Edit:
    """See ``SAE.ablate``."""
    chosen = list(latents)
    if not chosen:
        raise UnweaveError("no latents were named", remedy="pass the numbers of latents")
    subset = Subset(sae, chosen)
    basis = subset.span()

    def zero(source: Tensor, x: Tensor) -> Tensor:
        return x - subset.writes(subset.encode(source), source).to(x.dtype)

    def span(source: Tensor, x: Tensor) -> Tensor:
        del source
        rows = basis.to(x.dtype)
        return x - (x @ rows.T) @ rows

    return Edit(f"ablate ({mode}) {chosen}", sae, {"zero": zero, "span": span}[mode], where)


def reconstruct(sae: SAE, where: Where = "policy") -> Edit:
    """See ``SAE.reconstruct``."""
    sae.require_decoder()

    def change(source: Tensor, x: Tensor) -> Tensor:
        return sae.reconstruct_sparsely(source).to(x.dtype)

    return Edit("reconstruct", sae, change, where)


def orthonormal_basis(directions: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Orthonormal rows [r, D] that span directions [S, D]; r <= S, since parallel directions count once.

    From an SVD above a relative tolerance: a plain QR would turn the rounding error of dependent rows into directions.
    """
    _, sizes, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    return rows[sizes > tolerance * sizes.max()].to(directions.dtype)
