"""Where an edit acts: on which tokens, and while which latent fires."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.at import At
from unweave.lm.chat import Role
from unweave.sae.subset import Subset, finite

if TYPE_CHECKING:
    from unweave.data.policy import TokenPolicy
    from unweave.lm.model import LM
    from unweave.sae.module import SAE

Where = str | Role | Collection[str | Role] | Callable[[At], Tensor]
"""Which tokens an edit changes; never padding.

    "policy"                   those that the SAE was trained on
    "prompt", "answer"         of these, what the model is given, or its answer (``At.answer``)
    "answer:5"                 of these, the answer from its fifth token on
    "all"                      every one
    "assistant", {"system", "user"}   those of a role or of several (system, user, assistant, text, special)
    a function of At           those where it is true, bool [B, P]
"""

_PART = re.compile(r"policy|all|prompt|answer(:[1-9]\d{0,8})?")
_ROLES = {role.name.lower(): role for role in Role if role is not Role.PAD}


@dataclass(frozen=True)
class Fires:
    """True at tokens where a latent's activation is larger than ``above``, of those that its SAE was trained on."""

    sae: SAE
    latent: int
    above: float = 0.0

    def __post_init__(self) -> None:
        if finite(self.above) is None:
            raise UnweaveError(f"a latent cannot be above {self.above!r}", remedy="give a finite number")
        _ = self.subset

    @cached_property
    def subset(self) -> Subset:
        return Subset(self.sae, [self.latent])

    @property
    def site(self) -> Site:
        """Where the latent is read."""
        if self.sae.read is None:
            raise UnweaveError("this SAE's file named no site", remedy='name it: sae.at("resid_post.9")')
        return self.sae.read

    def verify(self, lm: LM, edited: Site) -> None:
        """Refuses a model that is not the SAE's, and a latent that is read behind the edit, too late for it."""
        self.sae.verify(lm)
        order = {site: place for place, site in enumerate(lm.sites())}
        if order.get(self.site, -1) > order.get(edited, len(order)):
            what = f"an edit at {edited} cannot wait for a latent that is read later, at {self.site}"
            raise UnweaveError(what, remedy="choose a latent of the same site or of an earlier one")

    def holds(self, x: Tensor, at: At, tokens: Tensor) -> Tensor:
        """At which of ``tokens`` bool [B, P] it is true, for the site's activation x [B, P, D]."""
        return tokens & (self.subset.encode(x)[..., 0] > self.above) & self.sae.policy.keep(x, at.ids, at.mask)


def tokens_where(where: Where, policy: TokenPolicy, source: Tensor, at: At) -> Tensor:
    """The tokens that ``where`` names, bool [B, P]. ``source`` [B, P, D] is what the SAE of the ``policy`` reads."""
    if callable(where):
        keep = where(at)
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != at.mask.shape:
            seen = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else repr(keep)[:60]
            what = f"where gave {seen}, not a bool tensor {list(at.mask.shape)}"
            remedy = "return one truth value per token, e.g. lambda at: at.roles == Role.USER"
            raise UnweaveError(what, where=str(at.site), remedy=remedy)
        return keep.to(at.mask.device) & at.mask
    roles = roles_of(where)
    if roles is not None:
        return torch.isin(at.roles, torch.tensor(roles, dtype=at.roles.dtype, device=at.roles.device)) & at.mask
    part, _, first = str(where).partition(":")
    if part == "all":
        return at.mask
    keep = policy.keep(source, at.ids, at.mask)
    if part == "policy":
        return keep
    return keep & (at.answer == 0 if part == "prompt" else at.answer >= int(first or 1))


def roles_of(where: Where) -> list[int] | None:
    """The roles that ``where`` names; None where it is a part of the text or a function. Else UnweaveError."""
    if callable(where) or (isinstance(where, str) and _PART.fullmatch(where)):
        return None
    named = [where] if isinstance(where, (str, Role)) else where
    if not isinstance(named, (list, tuple, set, frozenset)):
        named = None
    roles = [_ROLES.get(one.name.lower() if isinstance(one, Role) else str(one)) for one in named or ()]
    if not roles or None in roles:
        raise UnweaveError(
            f"where = {where!r} does not say which tokens to edit",
            remedy='use "policy", "all", "prompt", "answer", "answer:N" (from its N-th token), a role or several '
            f"({', '.join(_ROLES)}), or a function of At",
        )
    return [int(role) for role in roles if role is not None]
