"""``SAE``: the inference form of every sparse autoencoder, as it is loaded, saved, measured and used.

    f = activation(x W_enc + b_enc)          x [..., d_in],  f [..., d_sae]
    x_hat = f W_dec + b_dec (+ x W_skip)     x_hat [..., d_out]

Every published variant (tied input bias, input scaling, decoder norms, Gated, BatchTopK) folds into this on load, so
that the rest of the package knows one kind. A transcoder reads one site and writes another.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.sae import edits, provenance
from unweave.sae.activations import Activation, JumpReLU, ReLU, TopK
from unweave.sae.kernels import topk_rows

if TYPE_CHECKING:
    from unweave.lm.model import LM

_DENSE_BYTES = 32 << 20
"""how many bytes of dense latents one chunk may take"""


class SAE(nn.Module):
    """A sparse autoencoder (or transcoder) in inference form. Parameters are frozen.

    W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out] (rows are the latents' directions), b_dec [d_out],
    W_skip [d_in, d_out] or None. ``read`` and ``write`` are None when the file named no site: such an SAE encodes and
    decodes, and asks for a site before it can be used in a model. ``policy`` says which tokens it was trained on,
    ``provenance`` where it comes from.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        activation: Activation,
        *,
        W_skip: Tensor | None = None,
        read: Site | None = None,
        write: Site | None = None,
        policy: TokenPolicy | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "W_skip": W_skip}
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self.activation = activation
        self.read, self.write = read, write if write is not None else read
        self.policy = policy or TokenPolicy()
        self.provenance: dict[str, Any] = dict(provenance or {})
        self._trusted: weakref.WeakSet[LM] = weakref.WeakSet()
        self._check()

    def _check(self) -> None:
        d_in, d_sae = self.W_enc.shape
        wanted = {
            "b_enc": (d_sae,),
            "W_dec": (d_sae, self.W_dec.shape[-1]),
            "b_dec": (self.W_dec.shape[-1],),
            "W_skip": (d_in, self.W_dec.shape[-1]),
        }
        if isinstance(self.activation, JumpReLU) and tuple(self.activation.threshold.shape) != (d_sae,):
            raise UnweaveError(f"threshold has shape {list(self.activation.threshold.shape)}, not [{d_sae}]")
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise UnweaveError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}", remedy="check the file")
        for name, tensor in self.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise UnweaveError(f"{name} holds NaN or infinity", remedy="the SAE is damaged: load or train another")

    # -- what it is -----------------------------------------------------------------------------------------------

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def kind(self) -> str:
        """relu, jumprelu or topk."""
        return type(self.activation).__name__.lower()

    def __repr__(self) -> str:
        k = f", k {self.activation.k}" if isinstance(self.activation, TopK) else ""
        sites = f"{self.read}" if self.read == self.write else f"{self.read} -> {self.write}"
        return f"SAE({self.kind}{k}, {self.d_in} -> {self.d_sae} latents, {sites})"

    # -- encoding and decoding ------------------------------------------------------------------------------------

    def _matches(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise UnweaveError(
                f"this SAE reads {self.d_in} dimensions, but was given {x.shape[-1]}",
                where=str(self.read or "an SAE without a site"),
                remedy="use the SAE of this model and site",
            )
        return x.to(self.W_enc.dtype)

    def pre(self, x: Tensor) -> Tensor:
        """Pre-activations x W_enc + b_enc, [..., d_sae]."""
        return self._matches(x) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Latents [..., d_sae] of activations x [..., d_in]."""
        return self.activation(self.pre(x))

    def codes(self, x: Tensor) -> Codes:
        """Sparse latents of activations x [N, d_in], at most one chunk of dense ones at a time."""
        rows = max(1, _DENSE_BYTES // (4 * self.d_sae))
        parts = []
        with torch.no_grad():
            for chunk in x.split(rows):
                if isinstance(self.activation, TopK):
                    values, indices = topk_rows(self.pre(chunk), self.activation.k)
                    parts.append(Codes.from_topk(values.relu_(), indices, self.d_sae))
                else:
                    parts.append(Codes.from_dense(self.encode(chunk)))
        return Codes.cat(parts)

    def decode(self, f: Tensor | Codes) -> Tensor:
        """The activation [..., d_out] that latents [..., d_sae] or sparse latents stand for (without any skip)."""
        if isinstance(f, Codes):
            total = F.embedding_bag(
                f.indices, self.W_dec, f.offsets, per_sample_weights=f.values, mode="sum", include_last_offset=True
            )
            return total + self.b_dec
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction decode(encode(x)) (+ x W_skip), [..., d_out]."""
        out = self.decode(self.encode(x))
        return out if self.W_skip is None else out + self._matches(x) @ self.W_skip

    def reconstruct_sparsely(self, x: Tensor) -> Tensor:
        """``forward`` without gradients and without holding dense latents: for measuring, [..., d_out]."""
        flat = x.reshape(-1, x.shape[-1])
        out = self.decode(self.codes(flat))
        if self.W_skip is not None:
            out = out + self._matches(flat) @ self.W_skip
        return out.view(*x.shape[:-1], self.d_out).to(x.dtype)

    def subset(self, latents: Sequence[int]) -> edits.Subset:
        """A few latents on their own: their values and directions at the cost of their rows alone."""
        return edits.Subset(self, latents)

    # -- edits ----------------------------------------------------------------------------------------------------

    def clamp(self, values: Mapping[int, float], *, where: edits.Where = "policy") -> edits.Edit:
        """Sets latents to fixed values, keeping the SAE's error: x + sum_j (c_j - f_j(x)) d_j."""
        return edits.clamp(self, values, where)

    def add(self, values: Mapping[int, float], *, where: edits.Where = "policy") -> edits.Edit:
        """Adds multiples of latents' directions: x + sum_j c_j d_j."""
        return edits.add(self, values, where)

    def ablate(
        self, latents: Iterable[int], *, mode: Literal["zero", "span"] = "zero", where: edits.Where = "policy"
    ) -> edits.Edit:
        """Removes latents: what they wrote (``zero``: x - sum_j f_j d_j), or their span altogether (x - Q Q^T x)."""
        return edits.ablate(self, latents, mode, where)

    def reconstruct(self, *, where: edits.Where = "policy") -> edits.Edit:
        """Puts the reconstruction in place of the activation; the error is lost."""
        return edits.reconstruct(self, where)

    def at(self, read: str | Site, write: str | Site | None = None) -> Self:
        """Names the site(s) of an SAE whose file named none."""
        self._trusted.clear()
        self.read = Site.parse(read)
        self.write = Site.parse(write) if write is not None else self.read
        return self

    # -- trust and storage ----------------------------------------------------------------------------------------

    def verify(self, lm: LM) -> None:
        """Refuses a model whose activations at this SAE's site differ from those it was trained on (traps 12, 14, 25).

        Called by every edit before it is hooked. Raises UnweaveError with the measured distance.
        """
        if lm not in self._trusted:
            provenance.verify(self, lm)
            self._trusted.add(lm)

    def accept(self, lm: LM, reason: str) -> dict[str, Any]:
        """Uses this SAE in another model all the same; what was measured is recorded in its provenance and returned."""
        evidence = provenance.accept(self, lm, reason)
        self._trusted.add(lm)
        return evidence

    def save(self, folder: str | Path) -> Path:
        """Writes a SAELens folder: ``cfg.json`` and ``sae_weights.safetensors``."""
        from unweave.sae.formats import saelens

        return saelens.save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> SAE:
        """Reads a SAELens folder. Raises UnweaveError for missing, unknown, mis-shaped or damaged content."""
        from unweave.sae.formats import saelens

        return saelens.load(Path(folder))


__all__ = ["SAE", "JumpReLU", "ReLU", "TopK"]
