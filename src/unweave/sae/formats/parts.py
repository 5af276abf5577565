"""An SAE on its way from a file's parametrisation to ours, and the foldings that get it there.

    input bias         relu((x - b) W_enc + b_enc)            -> b_enc - b W_enc
    input scale        decode(encode(s x)) / s'               -> W_enc s, W_dec / s', b_dec / s', W_skip s / s'
    gated              1[g > 0] relu(e^r (g - b_gate) + b_mag) -> JumpReLU, threshold max(0, b_mag - e^r b_gate)
    decoder scale      decode(c f)                            -> W_dec c
    rank by norm       TopK of z |d|                          -> W_enc |d|, b_enc |d|, W_dec / |d|; zero rows left alone
    jump by norm       JumpReLU of z |d|                      -> threshold / |d|; latents keep their units

Folded weights are kept in at least float32: rounding a folded bias or threshold to half precision would move which
latents fire (trap 22). Weights that need no folding keep the file's dtype bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.sae.activations import Activation, JumpReLU, ReLU, TopK
from unweave.sae.formats.tensors import Tensors
from unweave.sae.input_norm import InputNorm
from unweave.sae.module import SAE

_NEVER = 1e30
"""A threshold that no pre-activation passes, finite so that it can be saved and checked."""


@dataclass
class Parts:
    """W_enc [d_in, F], b_enc [F], W_dec [F, d_out], b_dec [d_out], W_skip [d_in, d_out]; threshold [F] or k."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None = None
    threshold: Tensor | None = None
    k: int | None = None
    input_norm: InputNorm | None = None
    encode_only: str = ""

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def widen(self) -> None:
        """All of one type, which is at least float32, before folding."""
        self._cast(torch.float32)

    def _cast(self, *least: torch.dtype) -> None:
        """To the widest type that any tensor has."""
        dtype = reduce(torch.promote_types, (*least, *(tensor.dtype for tensor in self._tensors().values())))
        for name, tensor in self._tensors().items():
            setattr(self, name, tensor.to(dtype))

    def _tensors(self) -> dict[str, Tensor]:
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def fold_input_bias(self, bias: Tensor | None = None) -> None:
        """Takes ``bias`` [d_in] (b_dec by default) off the input."""
        self.widen()
        bias = self.b_dec if bias is None else bias
        if len(bias) != self.d_in:
            what = f"a bias of length {len(bias)} cannot be taken off inputs of {self.d_in} dimensions"
            raise UnweaveError(what, remedy="restore the file")
        self.b_enc = self.b_enc - bias.to(self.b_enc.dtype) @ self.W_enc

    def fold_input_scale(self, s_in: float, s_out: float | None = None) -> None:
        """The file wants inputs times ``s_in`` and gives outputs times ``s_out`` (the same by default).

        Pre-activations and thresholds stay as they are.
        """
        s_out = s_in if s_out is None else s_out
        if not (s_in > 0 and s_out > 0):
            raise UnweaveError(
                f"an input scale must be above 0; the file has {min(s_in, s_out)}", remedy="fix the file"
            )
        self.widen()
        self.W_enc, self.W_dec, self.b_dec = self.W_enc * s_in, self.W_dec / s_out, self.b_dec / s_out
        if self.W_skip is not None:
            self.W_skip = self.W_skip * (s_in / s_out)

    def fold_gate(self, gate: Tensor, magnitude: Tensor, log_gain: Tensor) -> None:
        """Gated: both paths share W_enc; b_enc is replaced."""
        self.widen()
        gate, magnitude, gain = (t.to(self.W_enc.dtype) for t in (gate, magnitude, log_gain.to(self.W_enc.dtype).exp()))
        self.W_enc, self.b_enc = self.W_enc * gain, magnitude
        self.threshold = (magnitude - gain * gate).clamp(min=0)

    def one_threshold(self, threshold: float) -> None:
        """BatchTopK: every latent has the same threshold."""
        self.widen()
        self.threshold = torch.full_like(self.b_enc, threshold)

    def fold_decoder_scale(self, factor: Tensor) -> None:
        """Latents times ``factor`` [F] before they are decoded."""
        self.widen()
        self.W_dec = self.W_dec * factor.to(self.W_dec.dtype).unsqueeze(1)

    def fold_rank_by_norm(self) -> None:
        """Latents are ranked by z |d|: their values become that."""
        self.widen()
        norms = self.norms()
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        self.W_enc, self.b_enc, self.W_dec = self.W_enc * norms, self.b_enc * norms, self.W_dec / norms.unsqueeze(1)

    def fold_jump_by_norm(self) -> None:
        """The threshold is one of z |d|. A latent that writes nothing never fires."""
        assert self.threshold is not None
        self.widen()
        norms = self.norms()
        self.threshold = torch.where(norms > 0, self.threshold / norms, torch.full_like(norms, _NEVER))

    def norms(self) -> Tensor:
        """Lengths of the decoder's rows [F]."""
        return self.W_dec.norm(dim=1)

    def activation(self) -> Activation:
        if self.k is not None:
            return TopK(self.k)
        return ReLU() if self.threshold is None else JumpReLU(self.threshold)

    def take_skip(self, tensors: Tensors, name: str = "W_skip", stated: str = "transposed") -> None:
        """The file's skip, where it has one."""
        if name in tensors:
            self.W_skip = tensors.matrix(name, rows=self.d_in, columns=len(self.b_dec), stated=stated)

    def build(
        self,
        *,
        read: Site | None,
        write: Site | None = None,
        policy: TokenPolicy | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> SAE:
        """The SAE, in the widest dtype that any of its tensors has."""
        self._cast()
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        self.threshold = tensors.pop("threshold", None)
        return SAE(
            **tensors, activation=self.activation(), input_norm=self.input_norm, encode_only=self.encode_only,
            read=read, write=write, policy=policy, provenance=provenance,
        )  # fmt: skip


def assemble(tensors: Tensors, names: Mapping[str, tuple[str, ...]], stated: Mapping[str, str]) -> Parts:
    """W_enc, b_enc, W_dec and b_dec by their names in the file, turned by their shapes and the biases' lengths.

    ``names`` gives each one's possible names, ``stated`` how the format writes the matrices ("as is" or "transposed"),
    which decides for square ones. Raises UnweaveError for what is missing or does not fit.
    """
    b_enc, b_dec = tensors.vector(*names["b_enc"]), tensors.vector(*names["b_dec"])
    W_enc = tensors.matrix(*names["W_enc"], rows=None, columns=len(b_enc), stated=stated["W_enc"])
    W_dec = tensors.matrix(*names["W_dec"], rows=len(b_enc), columns=len(b_dec), stated=stated["W_dec"])
    return Parts(W_enc, b_enc, W_dec, b_dec)


def with_input_bias(tensors: Mapping[str, Tensor], bias: str, sae: SAE) -> dict[str, Tensor]:
    """For formats that take b_dec off the input: the encoder's bias grows by b_dec W_enc, in at least float32."""
    wide = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}
    dtype = wide[bias].dtype
    return wide | {bias: wide[bias] + sae.b_dec.to(dtype) @ sae.W_enc.to(dtype)}


def agree(what: str, stated: int | None, actual: int, where: str) -> None:
    """UnweaveError unless the configuration, if it says anything, says what the tensors' shapes show."""
    if stated is not None and stated != actual:
        raise UnweaveError(
            f"the configuration says {what} {stated}, but the tensors' shapes say {actual}",
            where=where,
            remedy="configuration and weights do not belong together: restore them",
        )
