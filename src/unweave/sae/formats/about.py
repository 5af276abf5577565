"""What a file says of an SAE besides its numbers: where it belongs, its token policy, and where it comes from.

Our own block is kept in every format we write: as ``metadata.unweave`` or ``unweave`` in the configuration, or in a
file of its own. Other people's files say less; what they say goes into the provenance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.fields import Fields
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.sae.formats.parts import Parts
from unweave.sae.formats.source import Source
from unweave.sae.formats.tensors import Tensors, digest
from unweave.sae.module import SAE

_MOVES = ("device",)
"""what a configuration may say otherwise later: it has no part in the numbers"""


def own_block(sae: SAE, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What we keep of an SAE beside its weights, for JSON, with the ``config`` and ``tensors`` that are written."""
    written = {"config": {k: v for k, v in config.items() if k not in _MOVES}, "tensors": digest(tensors)}
    block: dict[str, Any] = {"read": sae.read and str(sae.read)}
    if sae.write != sae.read:
        block["write"] = sae.write and str(sae.write)
    return block | {"policy": sae.policy.to_dict(), "provenance": sae.provenance, "written": written}


def check_written(own: Fields, config: Fields, tensors: Tensors) -> None:
    """Refuses our own files whose settings or numbers were changed after they were written."""
    written = own.mapping("written")
    for name, value in written.mapping("config").values.items():
        if config.values.get(name) != value:
            raise config.error(
                f"{name} was written as {str(value)[:80]} and is now {str(config.values.get(name))[:80]}",
                'restore the file; or, where the change is meant, remove "written" from its unweave block',
            )
    stored = written.text("tensors")
    if stored is not None and stored != digest(tensors.values):
        raise tensors.error(
            "the weights are not those that were written: the file is damaged, or was changed",
            f'restore it; or, where the change is meant, remove "written" from the unweave block in {own.where}',
        )


def build_own(parts: Parts, own: Fields) -> SAE:
    """The SAE of a file that holds our block."""
    read, write = own.text("read"), own.text("write")
    provenance = own.mapping("provenance")
    _check_provenance(provenance)
    return parts.build(
        read=Site.parse(read) if read else None,
        write=Site.parse(write) if write else None,
        policy=TokenPolicy.from_dict(own.mapping("policy")),
        provenance=provenance.values,
    )


def _check_provenance(provenance: Fields) -> None:
    """Refuses a provenance whose parts are not what later stages read them as."""
    model = provenance.mapping("model")
    for name in ("name", "note", "tokenizer", "site"):
        model.text(name)
    fingerprint = model.mapping("fingerprint")
    norms, products = fingerprint.numbers("norms"), fingerprint.numbers("products")
    if fingerprint and (not norms or not products or len(products) % len(norms)):
        raise provenance.error(
            "the model's fingerprint is damaged: norms and products do not belong together",
            "restore the file, or remove provenance.model.fingerprint",
        )
    for part, read, names in (
        ("data", Fields.boolean, ("begins_with_bos",)), ("data", Fields.integer, ("context",)),
        ("train", Fields.text, ("model", "dtype")), ("train", Fields.mapping, ("data", "stream", "sae")),
        ("reference", Fields.number, ("l0", "unexplained_variance")),
        ("source", Fields.text, ("hook_name", "hook_name_out")),
    ):  # fmt: skip
        for name in names:
            read(provenance.mapping(part), name)
    provenance.sequence("accepted")


def build_foreign(
    parts: Parts,
    source: Source,
    format: str,
    *,
    hook: str | None = None,
    hook_out: str | None = None,
    sites: tuple[Site | None, Site | None] | None = None,
    model: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> SAE:
    """The SAE of somebody else's file. Its sites are ``sites``, or those of the hooks where our sites can name both.

    What the file says of itself (format, origin, hooks, and ``about``) is in ``provenance["source"]``.
    """
    about = about or {}
    fields = {"hook_name": hook, "hook_name_out": hook_out, "model": model, **about}
    origin = {"format": format, "path": source.origin, **source.facts}
    provenance: dict[str, Any] = {"source": origin | {k: v for k, v in fields.items() if v is not None}}
    if model:
        provenance["model"] = {"name": model}
    context = about.get("context")
    if context is not None:
        provenance["data"] = {"begins_with_bos": bool(about.get("prepend_bos", False)), "context": context}
    if sites is None:
        read, write = site_of(hook), site_of(hook_out)
        if hook_out is None or parts.encode_only:
            write = read
        sites = (read, write) if read is not None and write is not None else (None, None)
    return parts.build(read=sites[0], write=sites[1], provenance=provenance)


def site_of(hook: str | None) -> Site | None:
    """The site of a TransformerLens hook or of our own name; None where we have no name for it."""
    if not hook:
        return None
    for read in (Site.from_transformer_lens, Site.parse):
        try:
            return read(hook)
        except UnweaveError:
            continue
    return None


_HF_SIDES = {
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_heads",
    "self_attn.output": "attn_out",
    "mlp.output": "mlp_out",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_add",
}


def site_of_hf_hook(hook: str | None) -> Site | None:
    """The site of a name such as ``model.layers.3.post_feedforward_layernorm.output``; None for any other."""
    match = re.fullmatch(r"model\.layers\.([0-9]{1,6})\.(.+)", hook or "")
    point = _HF_SIDES.get(match[2]) if match else None
    return Site(point, int(match[1])) if match and point else None


_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.([0-9]{1,6})(?:\.(.+))?$")
_ATTENTIONS = ("attn", "self_attn", "attention")


def sites_of_module(path: str, transcodes: bool) -> tuple[Site | None, Site | None]:
    """Sites of an SAE on a module's output, or of a transcoder from its input to its output; None for unknown modules.

    ``path`` is a Hugging Face module path, with or without the model's own prefix, e.g. ``layers.10.mlp``.
    """
    if path.rsplit(".", 1)[-1] in ("embed_tokens", "wte", "embed_in"):
        return (None, None) if transcodes else (Site("embed"), Site("embed"))
    match = _BLOCK.search(path)
    if match is None:
        return None, None
    layer, part = int(match[1]), match[2] or ""
    before_after = {"": ("resid_pre", "resid_post"), "mlp": ("mlp_in", "mlp_out")}
    before_after |= dict.fromkeys(_ATTENTIONS, ("attn_in", "attn_out"))
    if part not in before_after:
        return None, None
    before, after = before_after[part]
    return Site(before if transcodes else after, layer), Site(after, layer)
