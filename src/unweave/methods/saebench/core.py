"""Core: reconstruction, sparsity, and what the model loses with the SAE in its place.

Correct form: ``sae.measure`` on disjoint parts of the text, one a seed: variance around the mean, mean ablation,
special tokens neither counted nor edited. Compatible form: SAEBench 0.6's formulas over batches of ``batch_rows`` rows,
with what is wrong in them; the whole text gives the number, parts of its batches the spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.data.batches import store_batches
from unweave.data.stream import ActivationSource
from unweave.inputs.inputs import data_of, token_store
from unweave.lm.model import Tokens
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.methods.saebench.spread import Scored
from unweave.methods.saebench.task import About, Bench, Task
from unweave.sae.measure.evaluate import evaluate
from unweave.sae.measure.passes import Passes
from unweave.sae.measure.result import Metrics
from unweave.sae.module import SAE

_CATEGORIES = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": tuple(
        f"ce_loss_{name}" for name in ("score", "with_ablation", "with_sae", "without_sae")
    ),
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "token_stats": ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"),
    "misc_metrics": (
        *(f"{kind}freq_over_{percent}_percent" for kind in ("", "normalized_") for percent in (1, 10)),
        *(f"average_max_{side}_cosine_sim" for side in ("encoder", "decoder")), "frac_alive",
    ),
}  # fmt: skip
_CHUNKS = 4
"""of each seed's part of the text (correct form)"""
Sums = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Prepared:
    bench: Bench
    chunks: ActivationSource
    about: About

    @property
    def parts(self) -> list[range]:
        """The chunks of each seed's part of the text; parts share none."""
        n, seeds = self.chunks.n_chunks, len(self.bench.seeds)
        return [range(i * n // seeds, (i + 1) * n // seeds) for i in range(seeds)]

    def score(self, sae: SAE, pieces: Pieces) -> Scored:
        weights = of_weights(sae)
        sums = [token_sums(sae, x, row) for x, row in self.bench.chunks(self.chunks)]
        rows = details(sums, sae, weights)
        if self.bench.spec.form == "correct":
            metrics = [pieces.value(f"part-{i}", Metrics, lambda part=part: self._evaluated(sae, part))
                       for i, part in enumerate(self.parts)]  # fmt: skip
            draws = [correct([sums[i] for i in part], one) | weights.means
                     for part, one in zip(self.parts, metrics, strict=True)]  # fmt: skip
            return Scored.of(draws, 0.0, rows)
        passes = Passes.of(self.bench.lm, self.bench.site, sae.write or self.bench.site)
        losses = [pieces.tensors(f"losses-{chunk:05d}", lambda chunk=chunk: self._losses(passes, sae, chunk))
                  for chunk in range(self.chunks.n_chunks)]  # fmt: skip
        whole, *parts = (compatible([sums[i] for i in part], [losses[i] for i in part]) | weights.means
                         for part in (range(len(sums)), *self.parts))  # fmt: skip
        return replace(Scored.of(parts, 0.0, rows), value=whole)

    def _evaluated(self, sae: SAE, part: range) -> Metrics:
        rows = [row for chunk in part for row in self.chunks.rows_of(chunk)]
        batches = store_batches(self.bench.lm, self.chunks.store, rows, self.bench.spec.batch_tokens)
        return evaluate(self.bench.lm, sae, batches).plain()

    def _losses(self, passes: Passes, sae: SAE, chunk: int) -> Sums:
        tokens, _ = self.chunks.store.batch(list(self.chunks.rows_of(chunk)), self.bench.lm.pad_id)
        return loss_sums(passes, sae, tokens.to(self.bench.lm.device), self.bench.policy.exclude_ids,
                         splice_special=self.bench.spec.core.splice_special)  # fmt: skip


def _prepare(bench: Bench) -> _Prepared:
    options, chunk = bench.spec.core, 0
    data = replace(data_of(bench.saes[0], options.data), heldout_documents=None)
    if bench.spec.form == "compatible":
        data = replace(data, pack=replace(data.pack, packing="blocks", context=options.context))
        chunk = options.context * options.batch_rows
    store, _ = token_store(bench.lm, bench.model, data, "heldout", options.tokens, bench.runs)
    source = bench.source(store, chunk or max(1, store.n_tokens // (_CHUNKS * len(bench.seeds))))
    if source.n_chunks < len(bench.seeds):
        raise UnweaveError(
            f"the text makes {source.n_chunks} batches, fewer than {len(bench.seeds)} seeds", where="core.tokens",
            remedy="measure on more tokens, with fewer rows in a batch, or with fewer seeds",
        )  # fmt: skip
    words = f"{store.n_tokens:,} held-out tokens of {', '.join(one.path for one in data.sources)}"
    return _Prepared(bench, source, About(store.digest, words, bench.counted(source, 0)[0]))


# -- sums over tokens -------------------------------------------------------------------------------------------------


def token_sums(sae: SAE, x: Tensor, row: Tensor) -> dict[str, Tensor]:
    """What a batch of activations x [n, D] in rows [n] adds to the means of reconstruction and sparsity."""
    codes = sae.codes(x.to(sae.W_enc.dtype))
    y, x = sae.explained(codes, x.to(sae.W_enc.dtype)).double(), x.double()
    rest, centred = (x - y).square().sum(1), (x - x.mean(0)).square().sum(1)
    length, length_hat = x.norm(dim=1), y.norm(dim=1)
    token, fired = codes.row_of_each(), codes.values > 0
    pairs = torch.unique(row[token[fired]] * codes.n_latents + codes.indices[fired])
    return {
        "n": torch.tensor(float(len(x)), dtype=torch.float64),
        "square": x.square().sum(),
        "rest": rest.sum(),
        "legacy": (1 - rest / centred).sum(),
        "length": length.sum(),
        "length_hat": length_hat.sum(),
        "ratio": (length_hat / length.where(length >= 1e-4, torch.ones_like(length))).sum(),
        "square_hat": y.square().sum(),
        "dot": (x * y).sum(),
        "cosine": ((x * y).sum(1) / (length * length_hat)).sum(),
        "nonzero": torch.tensor(float(len(codes.values)), dtype=torch.float64),
        "l1": codes.values.double().sum(),
        "fired": codes.counts().double(),
        "prompts": torch.bincount(pairs % codes.n_latents, minlength=codes.n_latents).double(),
        "width": torch.tensor(float(x.shape[1]), dtype=torch.float64),
    }


def loss_sums(
    passes: Passes, sae: SAE, tokens: Tokens, ignored: Sequence[int], *, splice_special: bool = True
) -> dict[str, Tensor]:
    """What a batch adds to SAEBench's losses: the cross-entropy of next tokens and KL(clean || edited), wherever no
    ``ignored`` id stands; with the reconstruction, and with zeros at every token."""
    with torch.no_grad():
        seen, end = passes.clean(tokens, None)
        x, y = seen[passes.read], seen[passes.write]
        counts = tokens.mask & ~torch.isin(tokens.ids, torch.tensor(list(ignored), device=tokens.ids.device))
        spliced = tokens.mask if splice_special else counts
        xhat = sae.reconstruct_sparsely(x).to(y.dtype)
        stream = None if passes.stream is None else seen[passes.stream]
        values = (torch.where(spliced[..., None], xhat, y), torch.zeros_like(y))
        ends = [end, *(passes.edited(tokens, value, stream, []) for value in values)]
        longer = Tokens(F.pad(tokens.ids, (0, 1)), F.pad(tokens.mask, (0, 1), value=True), F.pad(tokens.roles, (0, 1)))
        (row, position), ce, kl = passes.losses(ends, longer)  # the last token, which has no next one, has a KL
    counted = counts[row, position]
    has_next = counted & F.pad(tokens.mask, (0, 1))[row, position + 1]
    return {
        "ce": ce[:, has_next].sum(1), "next": has_next.double().sum(),
        "kl": kl[1:, counted].sum(1), "tokens": counted.double().sum(), "read": tokens.mask.double().sum(),
    }  # fmt: skip


# -- from sums to numbers ---------------------------------------------------------------------------------------------


def compatible(sums: Sequence[Sums], losses: Sequence[Sums]) -> dict[str, float]:
    """SAEBench 0.6's numbers of batches. Explained variance subtracts the square of the mean *square* (S / d)^2, mse is
    a token's squared error over the number of tokens in its batch, l1 a plain sum, the bias a mean over batches; the
    numbers of tokens are of all that were read, also of those that do not count."""
    total = _total(sums)
    n, d = total["n"], sums[0]["width"]
    square = torch.stack([one["square"] / one["n"] for one in sums]).mean()
    rest = torch.stack([one["rest"] / one["n"] for one in sums]).mean()
    numbers = _shared(total) | _losses_of(losses) | {
        "explained_variance": float(1 - rest / (square - (square / d) ** 2)),
        "explained_variance_legacy": float(total["legacy"] / n),
        "mse": float(torch.stack([one["rest"] / one["n"] for one in sums]).sum() / n),
        "cossim": float(total["cosine"] / n),
        "relative_reconstruction_bias": float(torch.stack([one["square_hat"] / one["dot"] for one in sums]).mean()),
        "l2_ratio": float(total["ratio"] / n),
        "l0": float(total["nonzero"] / n),
        "l1": float(total["l1"] / n),
    }  # fmt: skip
    return _defined(numbers)


def _total(parts: Sequence[Sums]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in parts]).sum(0) for name in parts[0]}


def _defined(numbers: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def correct(sums: Sequence[Sums], metrics: Metrics) -> dict[str, float]:
    """The same numbers as they should be; those that are undefined on this text are left out."""
    total = _total(sums)
    numbers = _shared(total) | {
        "kl_div_with_ablation": metrics.kl_mean,
        "kl_div_with_sae": metrics.kl_sae,
        "ce_loss_with_ablation": metrics.ce_mean,
        "ce_loss_with_sae": metrics.ce_sae,
        "ce_loss_without_sae": metrics.ce_clean,
        "explained_variance": metrics.explained_variance,
        "explained_variance_legacy": float(total["legacy"] / total["n"]),
        "mse": metrics.mse,
        "cossim": metrics.cosine,
        "relative_reconstruction_bias": float(total["square_hat"] / total["dot"]),
        "l2_ratio": metrics.norm_ratio,
        "l0": metrics.l0,
        "l1": metrics.l1,
        "total_tokens_eval_reconstruction": float(metrics.predictions),
    }
    if metrics.recovered_vs_mean is not None:
        score = (metrics.kl_mean - metrics.kl_sae) / metrics.kl_mean
        numbers |= {"ce_loss_score": metrics.recovered_vs_mean, "kl_div_score": score}
    return _defined(numbers)


def _losses_of(losses: Sequence[Sums]) -> dict[str, float]:
    total = _total(losses)
    clean, sae, zero = total["ce"] / total["next"]
    kl_sae, kl_zero = total["kl"] / total["tokens"]
    numbers = {
        "kl_div_score": (kl_zero - kl_sae) / kl_zero,
        "kl_div_with_ablation": kl_zero,
        "kl_div_with_sae": kl_sae,
        "ce_loss_score": (zero - sae) / (zero - clean),
        "ce_loss_with_ablation": zero,
        "ce_loss_with_sae": sae,
        "ce_loss_without_sae": clean,
        **{f"total_tokens_eval_{part}": total["read"] for part in ("reconstruction", "sparsity_variance")},
    }
    return {key: float(value) for key, value in numbers.items()}


def _shared(total: Sums) -> dict[str, float]:
    """What both forms define alike."""
    density = total["fired"] / total["n"]
    mass = float(density.sum()) or 1.0
    return {
        "l2_norm_in": float(total["length"] / total["n"]),
        "l2_norm_out": float(total["length_hat"] / total["n"]),
        "frac_alive": float((density > 0).double().mean()),
        "freq_over_1_percent": float((density > 0.01).double().mean()),
        "freq_over_10_percent": float((density > 0.1).double().mean()),
        "normalized_freq_over_1_percent": float(density[density > 0.01].sum()) / mass,
        "normalized_freq_over_10_percent": float(density[density > 0.1].sum()) / mass,
        "total_tokens_eval_sparsity_variance": float(total["n"]),
    }


# -- of the weights, and of each latent -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Cosines of an SAE's weights, [F] each."""

    encoder_norm: Tensor
    encoder_decoder: Tensor
    max_encoder: Tensor
    max_decoder: Tensor

    @property
    def means(self) -> dict[str, float]:
        return {
            "average_max_encoder_cosine_sim": float(self.max_encoder.mean()),
            "average_max_decoder_cosine_sim": float(self.max_decoder.mean()),
        }


def of_weights(sae: SAE) -> Weights:
    """Each latent's encoder norm, cosine of encoder and decoder row, and largest cosine with another latent's."""
    encoder, decoder = F.normalize(sae.W_enc.T.float(), dim=1), F.normalize(sae.W_dec.float(), dim=1)
    together = (encoder * decoder).sum(1) if encoder.shape == decoder.shape else torch.full((sae.d_sae,), float("nan"))
    return Weights(sae.W_enc.norm(dim=0).float(), together, _closest(encoder), _closest(decoder))


def _closest(rows: Tensor) -> Tensor:
    """The largest product of each of rows [F, D] with another row, a block of rows at a time."""
    largest = []
    for first in range(0, len(rows), 1024):
        products = rows[first : first + 1024] @ rows.T
        own = torch.arange(len(products), device=rows.device)
        products[own, own + first] = -torch.inf
        largest.append(products.amax(1))
    return torch.cat(largest)


def details(sums: Sequence[Sums], sae: SAE, weights: Weights) -> list[dict[str, Any]]:
    """SAEBench's row of each latent; firings per prompt are -1 where there are none, as NaN is there."""
    n, fired, prompts = (torch.stack([one[name] for one in sums]).sum(0) for name in ("n", "fired", "prompts"))
    columns: dict[str, Tensor] = {
        "feature_density": fired / n,
        "consistent_activation_heuristic": torch.where(prompts > 0, fired / prompts.clamp(min=1), -1.0),
        "encoder_bias": sae.b_enc,
        "encoder_norm": weights.encoder_norm,
        "encoder_decoder_cosine_sim": weights.encoder_decoder.nan_to_num(-1.0),
        "max_decoder_cosine_sim": weights.max_decoder,
        "max_encoder_cosine_sim": weights.max_encoder,
    }
    lists = [column.double().cpu().tolist() for column in columns.values()]
    return [
        {"index": i} | {name: round(value, 10) for name, value in zip(columns, row, strict=True)}
        for i, row in enumerate(zip(*lists, strict=True))
    ]


def _config(spec: SaebenchSpec) -> dict[str, Any]:
    rows, context = spec.core.batch_rows, spec.core.context
    batches = max(1, spec.core.tokens // (rows * context))
    computed = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics",
                "featurewise_density_statistics", "featurewise_weight_based_metrics")  # fmt: skip
    return {
        "batch_size_prompts": rows,
        "n_eval_reconstruction_batches": batches,
        "n_eval_sparsity_variance_batches": batches,
        "context_size": context,
        "exclude_special_tokens_from_reconstruction": not (spec.form == "compatible" and spec.core.splice_special),
        **{f"compute_{name}": True for name in computed},
    }


TASK = Task(
    name="core",
    eval_type="core",
    version=1,
    headlines={"explained_variance": 1, "ce_loss_score": 1},
    baselines=("random directions",),
    prepare=_prepare,
    config=_config,
    categories=lambda spec: _CATEGORIES,
)
