"""A site is a named place in a language model where an activation can be read or edited (elsewhere: a hook point).

    resid_post.12        the residual stream after block 12
    mlp_add.3            what block 3's MLP adds to the residual stream (after a post-norm, where the family has one)
    path.model.norm@in   escape hatch: the input of any module by its path (without ``@in``: its output)

Sites sort in the order in which a forward pass reaches them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import total_ordering

from unweave.core.errors import UnweaveError

LAYER_POINTS = (
    "resid_pre",
    "attn_in",
    "attn_heads",
    "attn_out",
    "attn_add",
    "resid_mid",
    "mlp_in",
    "mlp_act",
    "mlp_out",
    "mlp_add",
    "resid_post",
)
"""Points that every block has, in execution order (``resid_mid`` is missing where attention and MLP are parallel)."""

MODEL_POINTS = ("embed", "final_norm", "logits")
"""Points that a model has once."""

_TO_TL = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_heads": "attn.hook_z",
    "attn_add": "hook_attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_act": "mlp.hook_post",
    "mlp_add": "hook_mlp_out",
}
_FROM_TL = {name: point for point, name in _TO_TL.items()}
_NOT_TL = {
    "attn_in": "TransformerLens's ln1.hook_normalized lies before the norm's weight",
    "attn_out": "use attn_add: TransformerLens's hook_attn_out lies after a post-norm",
    "mlp_out": "use mlp_add: TransformerLens's hook_mlp_out lies after a post-norm",
    "final_norm": "TransformerLens's ln_final.hook_normalized lies before the norm's weight",
    "logits": "TransformerLens has no hook there",
    "path": "a module path has no TransformerLens name",
}


@total_ordering
@dataclass(frozen=True, slots=True)
class Site:
    """A place in a model: ``Site("resid_post", 12)``, written ``resid_post.12``. Safe as a file name.

    Raises UnweaveError for a point that does not exist, or a layer where none belongs.
    """

    point: str
    layer: int | None = None
    path: str = ""

    def __post_init__(self) -> None:
        if self.point in LAYER_POINTS:
            good = isinstance(self.layer, int) and self.layer >= 0 and not self.path
        elif self.point in MODEL_POINTS:
            good = self.layer is None and not self.path
        else:
            good = self.point == "path" and self.layer is None and bool(re.fullmatch(r"[\w.]+(@in)?", self.path))
        if not good:
            raise _unknown(str(self))

    def __str__(self) -> str:
        if self.point == "path":
            return f"path.{self.path}"
        return self.point if self.layer is None else f"{self.point}.{self.layer}"

    def _key(self) -> tuple[int, int, str]:
        if self.point == "embed":
            return (-1, 0, "")
        if self.layer is not None:
            return (self.layer, LAYER_POINTS.index(self.point), "")
        # Where a module path lies is known only to a model; such sites sort last and are never used as a stop by order.
        return (1 << 30, ("final_norm", "logits", "path").index(self.point), self.path)

    def __lt__(self, other: Site) -> bool:
        return self._key() < other._key()

    @classmethod
    def parse(cls, site: str | Site) -> Site:
        """The site that a string names, e.g. ``"resid_post.9"``; a Site is returned as it is."""
        if isinstance(site, Site):
            return site
        if not isinstance(site, str):
            raise _unknown(repr(site))
        if site.startswith("path."):
            return cls("path", path=site[len("path.") :])
        if site in MODEL_POINTS:
            return cls(site)
        match = re.fullmatch(r"([a-z_]+)\.([0-9]{1,6})", site)
        if match is None:
            raise _unknown(site)
        return cls(match[1], int(match[2]))

    def to_transformer_lens(self) -> str:
        """The TransformerLens hook name of this site, e.g. ``blocks.12.hook_resid_post``.

        Raises UnweaveError where TransformerLens has no hook with the same value.
        """
        if self.point == "embed":
            return "hook_embed"
        if self.point in _NOT_TL:
            raise UnweaveError(f"site {self} has no TransformerLens name", remedy=_NOT_TL[self.point])
        return f"blocks.{self.layer}.{_TO_TL[self.point]}"

    @classmethod
    def from_transformer_lens(cls, name: str) -> Site:
        """The site with the value of a TransformerLens hook; UnweaveError where none has the same value."""
        if name == "hook_embed":
            return cls("embed")
        match = re.fullmatch(r"blocks\.([0-9]{1,6})\.(.+)", name)
        if match is None or match[2] not in _FROM_TL:
            hooks = ", ".join(["hook_embed", *(f"blocks.N.{tl}" for tl in _FROM_TL)])
            raise UnweaveError(f"TransformerLens hook {name!r} names no site", remedy=f"known hooks: {hooks}")
        return cls(_FROM_TL[match[2]], int(match[1]))


def matching(pattern: str, sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """The sites that a pattern names, as pairs (read, write) in the order of execution.

    ``resid_post.*`` names a point in every layer that has it, ``mlp_add.{4,9,14}`` in these; ``mlp_in.*->mlp_add.*``
    pairs sites that are read with sites that are written (a transcoder's), one by one. ``sites`` are those there are.
    Raises UnweaveError for a pattern that fits nothing, and for sides of different length.
    """
    left, arrow, right = pattern.partition("->")
    reads = _side(left.strip(), pattern, sites)
    writes = _side(right.strip(), pattern, sites) if arrow else reads
    if len(reads) != len(writes):
        remedy = "name as many on the left of -> as on the right"
        raise UnweaveError(f"{len(reads)} sites to read and {len(writes)} to write", where=pattern, remedy=remedy)
    return list(zip(reads, writes, strict=True))


def _side(pattern: str, whole: str, sites: Sequence[Site]) -> list[Site]:
    if not re.search(r"[*{}]", pattern):
        return [Site.parse(pattern)]
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else [word.strip() for word in part.split(",")] for i, part in enumerate(parts)]
    chosen: dict[Site, None] = {}
    for words in itertools.product(*choices):
        written = "".join(words)
        if re.search(r"[{}]", written):
            raise UnweaveError(f"unbalanced braces in {pattern!r}", where=whole, remedy="write mlp_add.{4,9,14}")
        if "*" not in written:
            chosen[Site.parse(written)] = None
            continue
        expression = re.compile(".*".join(map(re.escape, written.split("*"))))
        some = [site for site in sites if expression.fullmatch(str(site))]
        if not some:
            raise UnweaveError(f"no site of this model fits {written!r}", where=whole, remedy="see `unweave doctor`")
        chosen |= dict.fromkeys(some)
    return sorted(chosen)


def _unknown(text: str) -> UnweaveError:
    return UnweaveError(
        f"{text!r} is not a site",
        remedy=f"write POINT.LAYER with a point of {', '.join(LAYER_POINTS)}; or {', '.join(MODEL_POINTS)}; "
        "or path.<module>[@in]",
    )
