"""Core against SAEBench's own steps, restated on the bare model: batches of logits, and means of means."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from unweave.core.site import Site
from unweave.lm.model import Tokens
from unweave.methods.saebench.core import compatible, correct, details, loss_sums, of_weights, token_sums
from unweave.sae.activations import ReLU, TopK
from unweave.sae.measure.evaluate import evaluate
from unweave.sae.measure.passes import Passes
from unweave.sae.module import SAE

SITE, ROWS, LENGTH, IGNORED = Site("resid_post", 1), 4, 9, (0, 1, 2)


def sae_of(kind):
    draw = torch.Generator().manual_seed(3)
    W_enc, b_enc, W_dec, b_dec = (torch.randn(s, generator=draw) for s in ((32, 48), (48,), (48, 32), (32,)))
    activation = TopK(6) if kind == "topk" else ReLU()
    return SAE(0.4 * W_enc, 0.3 * b_enc - 0.5, 0.1 * W_dec, 0.3 * b_dec, activation, read=SITE)


def batches_of(n=3):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 97, (n, ROWS, LENGTH), generator=draw)
    ids[:, :, 0] = 0  # BOS
    ids[0, 1, 4] = ids[2, 3, LENGTH - 1] = ids[1, 0, LENGTH - 2] = 1  # EOS in a row, at its end, and before it
    return list(ids)


def run(model, ids, change=None):
    """(activation after block 1, logits), with the activation replaced."""
    caught = []

    def hook(_module, _args, out):
        x = out if isinstance(out, torch.Tensor) else out[0]
        caught.append(x)
        if change is None:
            return out
        return change(x) if isinstance(out, torch.Tensor) else (change(x), *out[1:])

    handle = model.model.layers[1].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    handle.remove()
    return caught[0], logits


def reference(model, sae, batches, splice_special=True):
    """SAEBench 0.6: lists of per-token numbers, concatenated and averaged; explained variance with its mistake."""
    tokens = {name: [] for name in ("kl_sae", "kl_zero", "ce", "ce_sae", "ce_zero", "l0", "l1", "in", "out", "ratio",
                                    "legacy", "mse", "cos", "bias")}  # fmt: skip
    sums, squares, residuals = [], [], []
    fired, prompts, total = torch.zeros(sae.d_sae), torch.zeros(sae.d_sae), 0
    for ids in batches:
        mask = ~torch.isin(ids, torch.tensor(IGNORED))
        x, clean = run(model, ids)
        keep = torch.ones_like(mask) if splice_special else mask
        _, spliced = run(model, ids, lambda x, keep=keep: torch.where(keep[..., None], sae.decode(sae.encode(x)), x))
        _, zero = run(model, ids, torch.zeros_like)

        def ce(logits, ids=ids, mask=mask):
            each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            return each[mask[:, :-1]]

        def kl(new, clean=clean, mask=mask):
            p = clean.softmax(-1)
            return (p * (p.log() - new.softmax(-1).log())).sum(-1)[mask]

        for name, value in (("ce", ce(clean)), ("ce_sae", ce(spliced)), ("ce_zero", ce(zero)), ("kl_sae", kl(spliced)),
                            ("kl_zero", kl(zero))):  # fmt: skip
            tokens[name].append(value)
        f = sae.encode(x)
        y = sae.decode(f)[mask]
        x, acts = x[mask], f[mask]
        rest = (x - y).pow(2).sum(-1)
        tokens["l0"].append((acts != 0).sum(-1).float())
        tokens["l1"].append(acts.sum(-1))
        tokens["in"].append(x.norm(dim=-1))
        tokens["out"].append(y.norm(dim=-1))
        tokens["ratio"].append(y.norm(dim=-1) / x.norm(dim=-1))
        tokens["bias"].append((y.norm(dim=-1).pow(2).mean() / (x * y).sum(-1).mean())[None])
        tokens["mse"].append(rest / mask.sum())
        tokens["legacy"].append(1 - rest / (x - x.mean(0)).pow(2).sum(-1))
        tokens["cos"].append(F.cosine_similarity(x, y, dim=-1))
        sums.append(x.pow(2).sum(-1).mean())
        squares.append(x.pow(2).mean(0))
        residuals.append(rest.mean())
        hot = ((f > 0) & mask[..., None]).float()
        fired += hot.sum((0, 1))
        prompts += (hot.sum(1) > 0).float().sum(0)
        total += int(mask.sum())
    m = {name: float(torch.cat(values).mean()) for name, values in tokens.items()}
    variance = torch.stack(sums).mean() - torch.cat(squares).mean() ** 2
    density = fired / total
    return {
        "kl_div_with_sae": m["kl_sae"], "kl_div_with_ablation": m["kl_zero"],
        "kl_div_score": (m["kl_zero"] - m["kl_sae"]) / m["kl_zero"],
        "ce_loss_with_sae": m["ce_sae"], "ce_loss_without_sae": m["ce"], "ce_loss_with_ablation": m["ce_zero"],
        "ce_loss_score": (m["ce_zero"] - m["ce_sae"]) / (m["ce_zero"] - m["ce"]),
        "explained_variance": float(1 - torch.stack(residuals).mean() / variance),
        "explained_variance_legacy": m["legacy"], "mse": m["mse"], "cossim": m["cos"],
        "l2_norm_in": m["in"], "l2_norm_out": m["out"], "l2_ratio": m["ratio"],
        "relative_reconstruction_bias": m["bias"], "l0": m["l0"], "l1": m["l1"],
        "frac_alive": float((density > 0).float().mean()),
        "freq_over_10_percent": float((density > 0.1).float().mean()),
        "normalized_freq_over_10_percent": float(density[density > 0.1].sum() / density.sum()),
    }, fired / prompts  # fmt: skip


def ours(lm, sae, batches, splice_special=True):
    passes, sums, losses = Passes.of(lm, SITE, SITE), [], []
    for ids in batches:
        tokens = Tokens.of(ids)
        with lm.taps(read=[SITE], stop=SITE) as seen:
            lm(tokens)
        keep = ~torch.isin(ids, torch.tensor(IGNORED))
        row = torch.arange(ROWS)[:, None].expand_as(ids)[keep]
        sums.append(token_sums(sae, seen[SITE][keep], row))
        losses.append(loss_sums(passes, sae, tokens, IGNORED, splice_special=splice_special))
    return sums, losses


@pytest.mark.parametrize(("kind", "special"), [("relu", True), ("topk", False)])
def test_the_compatible_form_is_saebenchs(tiny, tiny_lm, kind, special):
    lm, sae, batches = tiny_lm("llama"), sae_of(kind), batches_of()
    sums, losses = ours(lm, sae, batches, special)
    numbers = compatible(sums, losses)
    expected, per_prompt = reference(tiny("llama"), sae, batches, special)
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    for row, firings in zip(details(sums, sae, of_weights(sae)), per_prompt.tolist(), strict=True):
        heuristic = row["consistent_activation_heuristic"]
        assert heuristic == -1 if firings != firings else heuristic == pytest.approx(firings, rel=1e-5)


def test_the_correct_form_is_that_of_evaluate_and_does_not_depend_on_batches(tiny_lm):
    lm, sae, batches = tiny_lm("llama"), sae_of("relu"), batches_of()
    sae.policy = type(sae.policy)(IGNORED)
    metrics = evaluate(lm, sae, [Tokens.of(ids) for ids in batches]).plain()
    sums, losses = ours(lm, sae, batches)
    numbers = correct(sums, metrics)
    assert numbers["explained_variance"] == metrics.explained_variance
    together = {name: torch.stack([one[name] for one in sums]).sum(0) for name in sums[0]}
    together["width"] = sums[0]["width"]
    one = correct([together], metrics)
    assert one["relative_reconstruction_bias"] == pytest.approx(numbers["relative_reconstruction_bias"])
    merged = compatible([together], losses)
    assert merged["mse"] < compatible(sums, losses)["mse"] / 2, "SAEBench's mse falls with the size of a batch"
    assert merged["explained_variance"] != pytest.approx(numbers["explained_variance"], abs=0.01)


def test_cosines_of_weights_are_those_of_all_pairs():
    sae = sae_of("relu")
    weights = of_weights(sae)
    unit = F.normalize(sae.W_dec, dim=1)
    products = unit @ unit.T - 9 * torch.eye(48)
    torch.testing.assert_close(weights.max_decoder, products.amax(1))
    torch.testing.assert_close(weights.encoder_decoder, F.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=1))


def test_an_explained_variance_of_the_mean_is_zero_only_in_the_correct_form(tiny_lm):
    """Predicting the mean explains nothing; SAEBench's formula calls it good where the mean is large."""
    lm, batches = tiny_lm("llama"), batches_of()
    zero = SAE(torch.zeros(32, 1), torch.zeros(1), torch.zeros(1, 32), torch.zeros(32), ReLU(), read=SITE)
    x = torch.cat([run(lm.model, ids)[0].reshape(-1, 32) for ids in batches]) + 5
    zero.b_dec = x.mean(0)
    sums = [token_sums(zero, x, torch.zeros(len(x), dtype=torch.int64))]
    losses = [{"ce": torch.ones(3), "next": torch.tensor(1.0), "kl": torch.ones(2), "tokens": torch.tensor(1.0),
               "read": torch.tensor(2.0)}]  # fmt: skip
    s, r = (float(sums[0][name] / sums[0]["n"]) for name in ("square", "rest"))
    assert compatible(sums, losses)["total_tokens_eval_sparsity_variance"] == 2
    assert "ce_loss_score" not in compatible(sums, losses), "zeros cost nothing, so there is no share to recover"
    value = compatible(sums, losses)["explained_variance"]
    assert value == pytest.approx(1 - r / (s - (s / 32) ** 2))
    assert abs(value) > 0.1
