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

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.chat import Role
from unweave.lm.taps import At
from unweave.sae.activations import Identity, JumpReLU, TopK

if TYPE_CHECKING:
    from unweave.lm.model import LM
    from unweave.sae.module import SAE

Where = str | Role | Collection[str | Role] | Callable[[At], Tensor]
"""Which tokens an edit changes; never padding.

    "policy"                   those that the SAE was trained on
    "all"                      every one
    "assistant", {"system", "user"}   those of a role or of several (system, user, assistant, text, special)
    a function of At           those where it is true, bool [B, P]
"""

_COUNT_UP_TO = 4
"""with so few latents, counting the winners above each is cheaper than finding a row's k-th largest"""


class Subset:
    """A few latents of an SAE: ``latents`` [S], ``W_enc`` [d_in, S], ``b_enc`` [S], ``directions`` [S, d_out]."""

    latents: Tensor
    W_enc: Tensor
    b_enc: Tensor

    def __init__(self, sae: SAE, latents: Iterable[int]) -> None:
        """Raises UnweaveError for an invalid, unknown or repeated latent."""
        chosen = _numbers(latents)
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
        if 0 < len(self.latents) <= _COUNT_UP_TO:
            counts = [_before(everything, j) for j in self.latents.tolist()]
            return torch.where(torch.stack(counts, -1) < activation.k, torch.relu(pre), 0.0)
        return activation(everything)[..., self.latents]


def _before(pre: Tensor, latent: int) -> Tensor:
    """How many pre-activations [..., F] go before a latent's: the larger ones, and equal ones that stand before it.

    NaN is the largest, as in ``kernels.topk_rows``, whose rule this is.
    """
    z, earlier, later = pre[..., latent : latent + 1], pre[..., :latent], pre[..., latent + 1 :]
    ahead = (earlier >= z) | earlier.isnan()
    behind = (later > z) | (later.isnan() & ~z.isnan())
    return ahead.sum(-1) + behind.sum(-1)


@dataclass(frozen=True)
class Edit:
    """An edit that knows its site: pass it to ``lm.taps(edit=...)`` or ``lm.generate(edit=...)``."""

    name: str
    sae: SAE
    change: Callable[[Tensor, Tensor], Tensor]
    """(what the SAE reads, what it writes to) -> the new value of the latter"""
    where: Where

    def __post_init__(self) -> None:
        _roles_of(self.where)

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
        return torch.where(self._tokens_to_edit(source, at).unsqueeze(-1), new, x)

    def _tokens_to_edit(self, source: Tensor, at: At) -> Tensor:
        """The tokens to change, bool [B, P]."""
        if callable(self.where):
            keep = self.where(at)
            if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != at.mask.shape:
                raise UnweaveError(
                    f"where gave {_seen(keep)}, not a bool tensor {list(at.mask.shape)}",
                    where=repr(self),
                    remedy="return one truth value per token, e.g. lambda at: at.roles == Role.USER",
                )
            return keep.to(at.mask.device) & at.mask
        roles = _roles_of(self.where)
        if roles is not None:
            return torch.isin(at.roles, torch.tensor(roles, dtype=at.roles.dtype, device=at.roles.device)) & at.mask
        return self.sae.policy.keep(source, at.ids, at.mask) if self.where == "policy" else at.mask

    def __repr__(self) -> str:
        return f"{self.name} at {self.sae.write}"


def _seen(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]


def _roles_of(where: Where) -> list[int] | None:
    """The roles that ``where`` names; None where it is "policy", "all" or a function. Else UnweaveError."""
    if callable(where) or (isinstance(where, str) and where in ("policy", "all")):
        return None
    by_name = {role.name.lower(): role for role in Role if role is not Role.PAD}
    named = [where] if isinstance(where, (str, Role)) else where
    if not isinstance(named, (list, tuple, set, frozenset)):
        named = None
    roles = [by_name.get(one.name.lower() if isinstance(one, Role) else str(one)) for one in named or ()]
    if not roles or None in roles:
        raise UnweaveError(
            f"where = {where!r} does not say which tokens to edit",
            remedy=f'use "policy", "all", a role or several ({", ".join(by_name)}), or a function of At',
        )
    return [int(role) for role in roles if role is not None]


def _whole(latent: object) -> int:
    """A latent's number. UnweaveError unless it is a whole number."""
    try:
        if _is_truth(latent):
            raise TypeError
        return operator.index(latent)  # type: ignore[arg-type]
    except TypeError:
        raise UnweaveError(f"{latent!r} is not a latent", remedy="name latents by whole numbers") from None


def finite(value: object) -> float | None:
    """A finite number, be it NumPy's or a tensor; None for anything else, truth values and texts among them."""
    if _is_truth(value) or isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_truth(value: object) -> bool:
    return isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def _vector(sae: SAE, values: Mapping[int, float]) -> Tensor:
    """The values in the SAE's dtype, [S]. UnweaveError for what is not finite there."""
    if not isinstance(values, Mapping):
        raise UnweaveError(f"{values!r} does not say which latents get which values", remedy="pass {latent: value}")
    if not values:
        raise UnweaveError("no latents were named", remedy="pass {latent: value}")
    dtype, numbers = sae.W_dec.dtype, list[float]()
    for latent, value in values.items():
        number = finite(value)
        if number is None or abs(number) > torch.finfo(dtype).max:
            raise UnweaveError(
                f"the value for latent {latent!r} is {value!r}",
                remedy=f"give a finite number for each latent, within the range of {dtype}",
            )
        numbers.append(number)
    return torch.tensor(numbers, dtype=dtype, device=sae.W_dec.device)


def _numbers(latents: Iterable[int]) -> list[int]:
    """The numbers of latents. UnweaveError for anything else."""
    if not isinstance(latents, Iterable) or isinstance(latents, (str, bytes)):
        raise UnweaveError(f"{latents!r} does not name latents", remedy="pass the numbers of latents, as a list")
    return [_whole(latent) for latent in latents]


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
    if mode not in ("zero", "span"):
        raise UnweaveError(f"unknown way to ablate {mode!r}", remedy="use mode zero or span")
    chosen = _numbers(latents)
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
