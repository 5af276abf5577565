"""Is this SAE being used in the model it was trained on? The evidence, and what happens when it is not.

An SAE carries ``provenance["model"]``: name, tokenizer fingerprint and what 16 fixed tokens do at its site. Weights
that were folded, fine-tuned or pruned, another layer, or another model altogether change that (traps 12, 14, 25).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from unweave.core.errors import UnweaveError
from unweave.lm.fingerprint import fingerprint_distance

if TYPE_CHECKING:
    from unweave.lm.model import LM
    from unweave.sae.module import SAE

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""How far apart two fingerprints of the same weights may be, by the model's dtype."""


def describe_model(lm: LM, sae: SAE) -> dict[str, Any]:
    """What an SAE remembers of its model, ready for JSON."""
    assert sae.read is not None
    return {
        "name": lm.name,
        "note": lm.note,
        "tokenizer": lm.tokenizer_fingerprint(),
        "site": str(sae.read),
        "fingerprint": lm.fingerprint(sae.read),
    }


def measure(sae: SAE, lm: LM) -> dict[str, Any]:
    """How this model differs from the SAE's own: distance of fingerprints, its tolerance, and whether tokenizers agree.

    Raises UnweaveError where the SAE has no site, the model no such site, or the widths differ.
    """
    if sae.read is None or (sae.write is None and not sae.encode_only):
        raise UnweaveError("this SAE's file named no site", remedy='name it: sae.at("resid_post.9")')
    if sae.W_enc.device != lm.device:
        raise UnweaveError(
            f"the SAE is on {sae.W_enc.device}, the model on {lm.device}", remedy=f'move it: sae.to("{lm.device}")'
        )
    for site, width in ((sae.read, sae.d_in), (sae.write, sae.d_out)):
        if site is None:  # an SAE that only encodes writes nowhere
            continue
        actual = lm.width(site)
        if actual != width:
            what = f"this SAE has {width} dimensions at {site}, the model has {actual}"
            raise UnweaveError(what, where=lm.name, remedy="use an SAE that was trained on this model and site")
    stored = sae.provenance.get("model", {})
    evidence: dict[str, Any] = {"model": lm.name, "trained_on": stored.get("name", "unknown"), "site": str(sae.read)}
    if "fingerprint" in stored:
        evidence["distance"] = round(fingerprint_distance(stored["fingerprint"], lm.fingerprint(sae.read)), 6)
        evidence["tolerance"] = TOLERANCE.get(lm.dtype, 5e-2)
    own = lm.tokenizer_fingerprint()
    if own is not None and stored.get("tokenizer") is not None:
        evidence["same_tokenizer"] = own == stored["tokenizer"]
    return evidence


def verify(sae: SAE, lm: LM) -> None:
    """Raises UnweaveError when the evidence is against using ``sae`` in ``lm``. Foreign SAEs carry none to check."""
    evidence = measure(sae, lm)
    problems = []
    if evidence.get("distance", 0.0) > evidence.get("tolerance", 0.0):
        far, limit = evidence["distance"], evidence["tolerance"]
        problems.append(
            f"activations of 16 fixed tokens differ by {far:.1%} (at most {limit:.1%} for the same weights)"
        )
    if not evidence.get("same_tokenizer", True):
        problems.append("the tokenizers differ")
    if problems:
        raise UnweaveError(
            f"this SAE was trained on {evidence['trained_on']}, not on this model: {'; '.join(problems)}",
            where=f"{sae.read} of {lm.name}",
            remedy="use the SAE's own model and site, or accept the difference: sae.accept(lm, reason), "
            "--accept-mismatch on the command line; it is then recorded",
        )


def accept(sae: SAE, lm: LM, reason: str) -> dict[str, Any]:
    """Records in the SAE's provenance that it is used in another model, why, and what was measured."""
    evidence = measure(sae, lm) | {"reason": reason}
    sae.provenance.setdefault("accepted", []).append(evidence)
    return evidence
