"""``SAE``: the inference form of every sparse autoencoder (SAE), as it is loaded, saved, measured and used.

    f = activation(x W_enc + b_enc)          x [..., d_in],  f [..., d_sae]
    x_hat = f W_dec + b_dec (+ x W_skip)     x_hat [..., d_out]

Every published variant (tied input bias, input scaling, decoder norms, Gated, BatchTopK) folds into this on load, so
that the rest of the package knows one kind. A transcoder reads one site and writes another. Two things do not fold and
are fields: inputs normalised token by token (``input_norm``), and latents without a decoder of their own, as in one
layer of a cross-layer transcoder (``encode_only``). What cannot honour them refuses.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
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
from unweave.sae.input_norm import InputNorm, Normalised, normalise
from unweave.sae.sparse.kernels import topk_rows

if TYPE_CHECKING:
    from unweave.lm.model import LM

_CHECK = "check the file"
_DENSE_BYTES = 32 << 20
"""how many bytes of dense latents one chunk may take"""


class SAE(nn.Module):
    """An SAE (or transcoder) in inference form. Parameters are frozen.

    W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out] (rows are the latents' directions), b_dec [d_out],
    W_skip [d_in, d_out] or None. ``read`` and ``write`` are None when the file names no site: such an SAE encodes and
    decodes, and asks for a site before it can be used in a model. ``policy`` says which tokens it was trained on,
    ``provenance`` where it comes from. ``input_norm`` normalises every token's input and undoes it after decoding.
    ``encode_only`` says why an SAE has no decoder; W_dec is then [d_sae, 0].
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
        input_norm: InputNorm | None = None,
        encode_only: str = "",
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
        self.input_norm: InputNorm | None = input_norm
        self.encode_only = encode_only
        self.read: Site | None = read
        self.write: Site | None = None if encode_only else (write if write is not None else read)
        self.policy = policy or TokenPolicy()
        self.provenance: dict[str, Any] = dict(provenance or {})
        self._trusted: weakref.WeakSet[LM] = weakref.WeakSet()
        self._check()

    def _check(self) -> None:
        sizes = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
        for name in ("W_enc", "W_dec"):
            if len(sizes[name]) != 2:
                raise UnweaveError(f"{name} has shape {sizes[name]}, not that of a matrix")
        self._check_norm()
        (d_in, d_sae), d_out = sizes["W_enc"], sizes["W_dec"][1]
        if d_in == 0 or d_sae == 0:
            raise UnweaveError(f"W_enc has shape {[d_in, d_sae]}: an SAE needs inputs and latents", remedy=_CHECK)
        if d_out == 0 and not self.encode_only:
            raise UnweaveError(f"W_dec has shape {sizes['W_dec']} and writes nothing", remedy="say why: encode_only")
        if isinstance(self.activation, TopK) and self.activation.k > d_sae:
            raise UnweaveError(f"k is {self.activation.k}, more than the {d_sae} latents", remedy="check the settings")
        shapes = {"b_enc": [d_sae], "W_dec": [d_sae, d_out], "b_dec": [d_out], "W_skip": [d_in, d_out]}
        for name, shape in (shapes | {"activation.threshold": [d_sae]}).items():
            if sizes.get(name, shape) != shape:
                label = name.rpartition(".")[2]
                raise UnweaveError(f"{label} has shape {sizes[name]}, not {shape}", remedy=_CHECK)
        for name, tensor in self.state_dict().items():
            if not tensor.is_floating_point():
                raise UnweaveError(f"{name} holds {tensor.dtype}, not floats", remedy="check the file")
            if not bool(torch.isfinite(tensor).all()):
                raise UnweaveError(f"{name} holds NaN or infinity", remedy="the SAE is damaged: load or train another")

    def _check_norm(self) -> None:
        if self.input_norm is None:
            return
        normalise(torch.ones(1, 2), self.input_norm)
        if self.is_transcoder and not self.encode_only:
            what = f"a transcoder's inputs cannot be normalised token by token ({self.input_norm})"
            remedy = "what it writes has another scale than what it reads, and no file says how to undo that"
            raise UnweaveError(what, remedy=remedy)

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
        sites = f"{self.read}" if self.read == self.write or self.encode_only else f"{self.read} -> {self.write}"
        extra = f", {self.input_norm}" if self.input_norm else ""
        extra += ", encodes only" if self.encode_only else ""
        return f"SAE({self.kind}{k}, {self.d_in} -> {self.d_sae} latents, {sites}{extra})"

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes something else than what it reads."""
        return self.W_skip is not None or self.read != self.write or self.d_in != self.d_out

    def digest(self) -> str:
        """Twelve digits over every number it holds: with a latent's index, a name that no other tool's numbering shares
        (trap 41). The same SAE in another dtype or after folding is another."""
        about = [self.kind, getattr(self.activation, "k", None), self.input_norm]
        hashed = hashlib.sha256(repr(about).encode())
        for name, tensor in sorted(self.state_dict().items()):
            hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()[:12]

    def require_decoder(self) -> None:
        """Raises UnweaveError for an SAE that only encodes (trap 24)."""
        if self.encode_only:
            what = f"this SAE encodes and has no decoder: {self.encode_only}"
            remedy = "use it for latents' values; reconstruction and edits need an SAE with a decoder"
            raise UnweaveError(what, where=repr(self), remedy=remedy)

    # -- encoding and decoding ------------------------------------------------------------------------------------

    def _matches(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            what = f"this SAE reads {self.d_in} dimensions, but was given {x.shape[-1]}"
            remedy = "use the SAE of this model and site"
            raise UnweaveError(what, where=str(self.read or "an SAE without a site"), remedy=remedy)
        return x.to(self.W_enc.dtype)

    def normalised(self, x: Tensor) -> Normalised | None:
        """Inputs x [..., d_in] in the SAE's units and the way back; None where nothing is normalised."""
        return None if self.input_norm is None else normalise(self._matches(x), self.input_norm)

    def pre(self, x: Tensor) -> Tensor:
        """Pre-activations x W_enc + b_enc, [..., d_sae]; x is first normalised where ``input_norm`` says so."""
        normal = self.normalised(x)
        return (self._matches(x) if normal is None else normal.x) @ self.W_enc + self.b_enc

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

    def decode(self, f: Tensor | Codes, x: Tensor | None = None) -> Tensor:
        """The activation [..., d_out] that latents [..., d_sae] or sparse latents stand for (without any skip).

        ``x`` [..., d_in] is what the latents were encoded from. Only an SAE with ``input_norm`` needs it, to undo the
        normalisation: without it UnweaveError is raised, as for an SAE that only encodes.
        """
        self.require_decoder()
        if self.input_norm is not None and x is None:
            raise UnweaveError(
                f"this SAE normalises every token's input ({self.input_norm}), so latents alone do not say what they "
                "stand for",
                where=repr(self),
                remedy="decode(latents, x) with the activations they came from; not every use of an SAE has them",
            )
        if isinstance(f, Codes):
            total = F.embedding_bag(
                f.indices, self.W_dec, f.offsets, per_sample_weights=f.values, mode="sum", include_last_offset=True
            )
        else:
            total = f @ self.W_dec
        out = total + self.b_dec
        normal = None if x is None else self.normalised(x)
        return out if normal is None else out * normal.scale + normal.shift

    def through_skip(self, x: Tensor, keep: Tensor | None = None) -> Tensor | None:
        """The skip's output for x [..., d_in]: x W_skip [..., d_out]; None where there is no skip.

        It is zero where ``keep`` [..., 1] is false.
        """
        if self.W_skip is None:
            return None
        skip = self._matches(x) @ self.W_skip
        return skip if keep is None else skip * keep

    def explained(self, f: Tensor | Codes, x: Tensor) -> Tensor:
        """The reconstruction: decode(f) (+ x W_skip) [..., d_out], with x [..., d_in] what f was encoded from."""
        skip = self.through_skip(x)
        return self.decode(f, x) if skip is None else self.decode(f, x) + skip

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction decode(encode(x)) (+ x W_skip), [..., d_out]."""
        return self.explained(self.encode(x), x)

    def reconstruct_sparsely(self, x: Tensor) -> Tensor:
        """``forward`` without gradients and without holding dense latents: for measuring, [..., d_out]."""
        flat = x.reshape(-1, x.shape[-1])
        out = self.explained(self.codes(flat), flat)
        return out.view(*x.shape[:-1], self.d_out).to(x.dtype)

    def subset(self, latents: Iterable[int]) -> edits.Subset:
        """A few latents on their own: their values and directions at the cost of their rows alone."""
        return edits.Subset(self, latents)

    # -- edits ----------------------------------------------------------------------------------------------------

    def edit(
        self,
        mode: edits.Mode,
        values: Mapping[int, edits.Strength],
        *,
        where: edits.Where = "policy",
        when: edits.Fires | None = None,
    ) -> edits.Edit:
        """Changes latents, keeping the SAE's error, by one of the modes of ``sae/edits.py``.

        ``values`` has a strength for each latent: a number, or a tensor [B] with one per row of the batch, in which NaN
        leaves the row alone. ``where`` says on which tokens, ``when`` while which other latent fires (``SAE.fires``).
        """
        return edits.edit(self, mode, values, where, when)

    def clamp(
        self, values: Mapping[int, edits.Strength], *, where: edits.Where = "policy", when: edits.Fires | None = None
    ) -> edits.Edit:
        """Sets latents to fixed values, keeping the SAE's error: x + sum_j (c_j - f_j(x)) d_j. See ``edit``."""
        return edits.edit(self, "clamp", values, where, when)

    def add(
        self, values: Mapping[int, edits.Strength], *, where: edits.Where = "policy", when: edits.Fires | None = None
    ) -> edits.Edit:
        """Adds multiples of latents' directions: x + sum_j c_j d_j. See ``edit``."""
        return edits.edit(self, "add", values, where, when)

    def ablate(
        self,
        latents: Iterable[int],
        *,
        mode: Literal["zero", "span"] = "zero",
        where: edits.Where = "policy",
        when: edits.Fires | None = None,
    ) -> edits.Edit:
        """Removes latents: what they wrote (``zero``: x - sum_j f_j d_j), or their span altogether (x - Q Q^T x)."""
        return edits.ablate(self, latents, mode, where, when)

    def fires(self, latent: int, above: float = 0.0) -> edits.Fires:
        """The condition that a latent's activation is larger than ``above``, for ``when=`` of an edit."""
        return edits.Fires(self, latent, above)

    def reconstruct(self, *, where: edits.Where = "policy") -> edits.Edit:
        """Puts the reconstruction in place of the activation; the error is lost."""
        return edits.reconstruct(self, where)

    def at(self, read: str | Site, write: str | Site | None = None) -> Self:
        """Names the site(s) of an SAE whose file named none."""
        self._trusted.clear()
        self.read = Site.parse(read)
        if not self.encode_only:
            self.write = Site.parse(write) if write is not None else self.read
        self._check_norm()
        return self

    def with_weights(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, note: str) -> SAE:
        """This SAE with other weights, as compression makes them; ``note`` goes into its provenance."""
        other = SAE(
            *(W_enc, b_enc, W_dec, self.b_dec),
            self.activation,
            W_skip=self.W_skip,
            input_norm=self.input_norm,
            encode_only=self.encode_only,
            read=self.read,
            write=self.write,
            policy=self.policy,
            provenance=self.provenance | {"compressed": [*self.provenance.get("compressed", ()), note]},
        )
        other._trusted |= self._trusted
        return other

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

    def save(self, folder: str | Path, format: str = "unweave") -> Path:
        """Writes a folder: ``cfg.json`` and ``sae_weights.safetensors`` as SAELens has them, or another tool's files.

        ``format`` is unweave, saelens, dictionary_learning or sparsify. The first is SAELens's, with names of our own
        for what SAELens has no word for. Raises UnweaveError for what a format cannot say.
        """
        from unweave.sae.formats import registry

        return registry.save(self, Path(folder), format)

    @classmethod
    def load(cls, name: str | Path) -> SAE:
        """Reads a trained SAE in any known format: a folder, a file, ``hub:org/name[@revision][/sub/folder]``, or
        ``saelens:RELEASE/ID``.

        The format is recognised by content. Raises UnweaveError for whatever is missing, unused, mis-shaped, damaged
        or not understood.
        """
        from unweave.sae.formats import registry

        return registry.load(name)


__all__ = ["SAE", "JumpReLU", "ReLU", "TopK"]
