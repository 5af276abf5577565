"""Whether a spec, the widths of its sites and the SAE to start from go together: known before any activation is."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.methods.train.kinds import SAESpec, changed, default_of
from unweave.sae.activations import JumpReLU, TopK
from unweave.sae.module import SAE

_SAME = 1e-4
"""relative differences below which norms are taken to be equal"""


def latents(spec: SAESpec, d_in: int, d_out: int | None = None, start: SAE | None = None) -> int:
    """How many latents training has, between activations of these widths (``d_out`` None: no transcoder).

    Raises UnweaveError where spec, widths and the SAE to start from do not go together.
    """
    count = spec.expansion * d_in if start is None else _latents_of(start, spec, d_in)
    spec.refuse_size(count)
    if spec.skip != "none" and d_out is None:
        raise UnweaveError("a skip without a target would be the identity", where="sae.skip", remedy="leave skip out")
    if start is not None:
        _refuse_idle(spec, start)
        _refuse_unfit(spec, start, (d_in, count, d_in if d_out is None else d_out))
        _refuse_other_kind(spec, start)
    return count


def _latents_of(start: SAE, spec: SAESpec, d_in: int) -> int:
    """The latents of an SAE to go on with, where expansion can say how many those are; else what expansion says."""
    if start.d_in != d_in or start.d_sae % d_in == 0:
        return spec.expansion * d_in
    if "expansion" in changed(spec):
        raise UnweaveError(
            f"the SAE to start from has {start.d_sae} latents, which is no multiple of its width {d_in}: "
            f"expansion {spec.expansion} does not fit it",
            remedy=f"leave expansion out, or set it to {default_of(spec, 'expansion')}: it then has no effect",
        )
    return start.d_sae


def _refuse_idle(spec: SAESpec, start: SAE) -> None:
    """Trap 31: what would have no effect on weights that are there already."""
    fields = changed(spec)
    for name in (name for name in spec.begun() if name in fields):
        raise UnweaveError(
            f"{name} = {fields[name]!r} would have no effect: weights are those of the SAE to start from",
            remedy=f"leave {name} out; beside a preset, set it to {str(default_of(spec, name)).lower()}",
        )
    if spec.skip == "fit" and start.W_skip is not None:
        what = "skip = 'fit' would have no effect: the SAE to start from has its skip"
        raise UnweaveError(what, remedy="use skip: zero")


def _refuse_unfit(spec: SAESpec, start: SAE, sizes: tuple[int, int, int]) -> None:
    if (start.d_in, start.d_sae, start.d_out) != sizes:
        raise UnweaveError(
            f"the SAE to start from is {start.d_in} -> {start.d_sae} latents -> {start.d_out}, not "
            f"{' -> '.join(map(str, sizes))}",
            remedy="set expansion to its latents per dimension, and use activations of its site",
        )
    start.require_decoder()
    if start.input_norm is not None:
        what = f"the SAE to start from normalises its inputs token by token ({start.input_norm})"
        raise UnweaveError(what, remedy="training does not; start from one whose inputs are taken as they are")
    if (start.W_skip is None) != (spec.skip == "none"):
        has = "has no skip" if start.W_skip is None else "has a skip"
        raise UnweaveError(f"the SAE to start from {has}", remedy="set skip accordingly")


@torch.no_grad()
def _refuse_other_kind(spec: SAESpec, start: SAE) -> None:
    norms = start.W_dec.double().norm(dim=1)
    if not _goes_on(spec, start, norms):
        others = [kind() for kind in SAESpec.kinds() if not isinstance(spec, kind)]
        remedy = f"use kind {' or '.join(other.kind for other in others if _goes_on(other, start, norms))}"
        raise UnweaveError(f"a {start.kind} SAE cannot go on as {spec.kind}", where="start", remedy=remedy)
    if isinstance(start.activation, TopK):
        _refuse_other_topk(start.activation.k, spec.k, norms)


def _goes_on(spec: SAESpec, start: SAE, norms: Tensor) -> bool:
    """Whether the kind has ``start`` as an inference form, once its decoder ``norms`` [F] are moved to the encoder."""
    if isinstance(start.activation, TopK) or spec.topk() is not None:
        return isinstance(start.activation, TopK) and spec.topk() is not None
    threshold = torch.zeros_like(norms)
    if isinstance(start.activation, JumpReLU):
        threshold = start.activation.threshold.double().clamp_min(0) * torch.where(norms > 0, norms, 1.0)
    return spec.continues(threshold)


def _refuse_other_topk(k: int, k_of_spec: int, norms: Tensor) -> None:
    if k != k_of_spec:
        raise UnweaveError(f"this SAE has k {k}, not {k_of_spec}", where="start", remedy="set k to its own")
    if float(norms.max() - norms.min()) > _SAME * float(norms.max()):
        what = "decoder rows of this TopK SAE differ in norm, and scaling them to 1 would change which latents win"
        raise UnweaveError(what, where="start", remedy="start from an SAE whose decoder rows have equal norms")
