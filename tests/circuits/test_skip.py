"""A transcoder's skip in attribution, edges and faithfulness: a linear path past its nodes, whatever is done to them.

Oracles: a linear model in which every share is known, finite differences, and the circuit kept by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.attribute.attribution import Interventions, node_effects
from unweave.attribute.options import AttributionOptions
from unweave.attribute.runner import AtSite
from unweave.attribute.states import states
from unweave.circuits.about import AblationOptions, Options
from unweave.circuits.edges import edge_effects
from unweave.circuits.faithfulness import ablate_outside
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE

F, N, P, D = 20, 3, 6, 32
EXCLUDED = 50
WRITE, READ = Site("mlp_add", 1), Site("mlp_in", 1)
SITES = {"embed": None, "resid_post.0": None, "attn_add.1": "attn_in.1", "mlp_add.1": "mlp_in.1", "resid_post.2": None}


def make_sae(lm: LM, site: str, seed: int, read: str | None = None) -> SAE:
    """Random and float64, no parameter at zero; with a skip where it reads another site than it writes."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    d_in, d = lm.width(read or site), lm.width(site)
    weights = (draw(d_in, F) / d_in**0.5, draw(F) * 0.3, draw(F, d) * 0.3, draw(d) * 0.2)
    skip = draw(d_in, d) * 0.3 if read else None
    where = {"read": Site.parse(read or site), "write": Site.parse(site)}
    return SAE(*weights, ReLU(), W_skip=skip, **where, policy=TokenPolicy(exclude_ids=(EXCLUDED,)))


def make_pair() -> tuple[Tokens, Tokens]:
    """Two tokens differ; some are such as the policy excludes."""
    clean = torch.randint(3, 49, (N, P), generator=torch.Generator().manual_seed(7))
    patch = clean.clone()
    patch[:, 1:3] = (patch[:, 1:3] + 11) % 40 + 3
    clean[0, 3] = patch[0, 3] = clean[1, 2] = EXCLUDED
    return Tokens.of(clean), Tokens.of(patch)


def values(lm: LM, site: Site, tokens: Tokens) -> Tensor:
    with lm.taps(read=[site]) as seen:
        lm(tokens)
    return seen[site]


def parts(sae: SAE, source: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, error, and what the skip passes on, as they are defined."""
    there = (ids != EXCLUDED).unsqueeze(-1)
    f = sae.encode(source) * there
    passed = torch.zeros_like(y) if sae.W_skip is None else (source @ sae.W_skip) * there
    return f, y - f @ sae.W_dec - sae.b_dec - passed, passed


def close(a: Any, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def difference(out: Tensor, rows: Tensor) -> Tensor:
    return out[:, 5] - (1.0 + 0.3 * rows.to(out.device)) * out[:, 7]


@pytest.mark.parametrize("ablate", [False, True])
@pytest.mark.parametrize("method", ["attribution", "ig", "exact"])
def test_latents_and_error_are_what_they_are_in_a_linear_model_and_add_up(tiny: Any, method: Any, ablate: bool) -> None:
    """The last block adds nothing, so the metric is v times what block 1's MLP adds, and every share is known.

    Whatever latents and error go to, the skip passes on what there is to read: the clean input.
    """
    model = tiny("gpt2").double()
    for path in ("attn.c_proj", "mlp.c_proj"):
        for parameter in model.transformer.h[2].get_submodule(path).parameters():
            parameter.data.zero_()
    lm = LM(model, None)
    sae = make_sae(lm, str(WRITE), 0, str(READ))
    clean, patch = make_pair()
    other = None if ablate else patch
    top = Site("resid_post", 2)
    v = torch.randn(N, P, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def metric(out: Tensor, rows: Tensor) -> Tensor:
        return (out * v[rows]).sum((1, 2))

    found = node_effects(lm, sae, clean, other, AtSite(metric, top), AttributionOptions(method=method, steps=3))[WRITE]
    y, y2 = values(lm, WRITE, clean), values(lm, WRITE, patch)
    f, e, passed = parts(sae, values(lm, READ, clean), y, clean.ids)
    f2, e2, passed2 = parts(sae, values(lm, READ, patch), y2, patch.ids)
    assert not torch.allclose(passed2, passed)
    if ablate:
        f2, e2 = 0 * f, 0 * e
    close(found.latents, (f2 - f) * (v @ sae.W_dec.T))
    close(found.error, ((e2 - e) * v).sum(-1))
    end = f2 @ sae.W_dec + sae.b_dec + e2 + passed
    total = ((end - y) * v).sum((1, 2))
    latents, error = found.over_positions()
    close(latents.sum(1) + error, total)
    start = metric(values(lm, top, clean), torch.arange(N))
    ends = Interventions(lm, sae, clean, other, AtSite(metric, top)).endpoints()
    close(ends[0], start)
    close(ends[1], start + total)


def test_what_a_skip_explains_is_not_left_to_the_error(tiny: Any) -> None:
    """A skip fitted to what the latents leave: the error is what the fit leaves, by least squares alone."""
    lm = LM(tiny("gpt2").double(), None)
    plain = make_sae(lm, str(WRITE), 0, str(READ))
    clean, patch = make_pair()
    sources, rests = [], []
    for tokens in (clean, patch):
        source = values(lm, READ, tokens)
        there = (tokens.ids != EXCLUDED).flatten()
        sources.append(source.flatten(0, 1)[there])
        rests.append((values(lm, WRITE, tokens) - plain.decode(plain.encode(source))).flatten(0, 1)[there])
    source, rest = torch.cat(sources), torch.cat(rests)
    # As many tokens as directions: a ridge, so that something is left.
    fit = torch.linalg.solve(source.T @ source + 5.0 * torch.eye(D, dtype=torch.float64), source.T @ rest)
    weights = (plain.W_enc, plain.b_enc, plain.W_dec, plain.b_dec, ReLU())
    sae = SAE(*weights, W_skip=fit, read=READ, write=WRITE, policy=plain.policy)
    found = [
        states(lm, sae, tokens)[WRITE].error.flatten(0, 1)[(tokens.ids != EXCLUDED).flatten()]
        for tokens in (clean, patch)
    ]
    close(torch.cat(found), rest - source @ fit)
    assert float((rest - source @ fit).square().sum()) < 0.5 * float(rest.square().sum())


@pytest.mark.parametrize("read", ["attn_in.1", "attn_heads.1", "resid_pre.1"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neox_sequential", "llama"])
def test_edges_through_a_skip_equal_finite_differences(tiny: Any, family: str, read: str) -> None:
    """Move one node a little; latents and errors of all others stay at their clean values, skips pass on what comes.

    What is read before attention comes from one token, and from several what is read behind it.
    """
    lm = LM(tiny(family).double(), None)
    sites = SITES | {"attn_add.1": read}
    saes = {Site.parse(site): make_sae(lm, site, seed, where) for seed, (site, where) in enumerate(sites.items())}
    clean, patch = (tokens.rows(slice(0, 1)) for tokens in make_pair())
    effects = node_effects(lm, saes, clean, patch, difference)
    found = edge_effects(lm, saes, clean, patch, effects, Options(node_threshold=0.0))
    reads = {site: sae.read or site for site, sae in saes.items()}
    at = [{site: values(lm, site, tokens) for site in {*reads, *reads.values()}} for tokens in (clean, patch)]
    start, end = (
        {site: parts(sae, here[reads[site]], here[site], tokens.ids) for site, sae in saes.items()}
        for here, tokens in zip(at, (clean, patch), strict=True)
    )

    def run(up: Site, move: Tensor) -> dict[Site, tuple[Tensor, Tensor, Tensor]]:
        """The parts of every site as the stream brings them, with the nodes of all sites held and ``up`` moved."""
        seen = {}

        def hold(y: Tensor, where: Any) -> Tensor:
            site, sae = where.site, saes[where.site]
            source = y if reads[site] == site else where.read[reads[site]]
            seen[site] = parts(sae, source.double(), y.double(), clean.ids)
            f, e, _ = start[site]
            held = f @ sae.W_dec + sae.b_dec + e + seen[site][2]
            return (held + move if site == up else held).to(y.dtype)

        others = [source for site, source in reads.items() if source != site]
        with lm.taps(read=others, edit=dict.fromkeys(saes, hold)):
            lm(clean)
        return seen

    step, tolerance = (2e-3, 2e-3) if family == "llama" else (1e-4, 1e-6)  # its norms compute in float32
    compared = through = 0
    for (up, down), edges in found.items():
        if down is None:
            continue
        order = edges.weight.abs().argsort(descending=True)
        for k in (*order[edges.up[order, 1] < F][:3].tolist(), *order[edges.up[order, 1] == F][:1].tolist()):
            (q, i), (p, j) = edges.up[k].tolist(), edges.down[k].tolist()
            change = end[up][0] - start[up][0], end[up][1] - start[up][1]
            move = torch.zeros(1, P, lm.width(up), dtype=torch.float64)
            move[0, q] = change[0][0, q, i] * saes[up].W_dec[i] if i < F else change[1][0, q]
            g = effects[down].gradient[0, p]  # type: ignore[index]
            sides, smooth = [], True
            for sign in (1, -1):
                f, e, _ = run(up, sign * step * move)[down]
                smooth &= torch.equal(f[0, p] > 0, start[down][0][0, p] > 0)
                sides.append(float(f[0, p, j] * (g @ saes[down].W_dec[j]) if j < F else g @ e[0, p]))
            if not smooth:  # a latent came or went on the way
                continue
            expected = (sides[0] - sides[1]) / (2 * step)
            assert abs(expected - float(edges.weight[k])) < tolerance * max(1.0, abs(expected)), (up, down, k)
            compared += 1
            through += up == Site("resid_post", 0) and down == Site("resid_post", 2)
    assert compared > 12 and through >= 2


@pytest.mark.parametrize("over", ["patch", "zero"])
def test_a_circuit_keeps_the_skips_of_transcoders_alive(tiny: Any, over: Any) -> None:
    """Kept nodes as the changed stream has them, others at their means, and the skip of what there is to read."""
    lm = LM(tiny("gpt2").double(), None)
    saes = {Site.parse(site): make_sae(lm, site, seed, read) for seed, (site, read) in enumerate(SITES.items())}
    clean, patch = make_pair()
    g = torch.Generator().manual_seed(5)
    kept = {site: torch.rand(P, F + 1, generator=g) < 0.5 for site in saes}
    for site in (Site("attn_add", 1), WRITE):  # without the error, and with it
        kept[site][:, -1] = site == WRITE
    reads = {site: sae.read or site for site, sae in saes.items()}
    at = {site: values(lm, site, patch) for site in {*reads, *reads.values()}}
    means = {}
    for site, sae in saes.items():
        f, e, _ = parts(sae, at[reads[site]], at[site], patch.ids)
        means[site] = (0 * f.mean(0), 0 * e.mean(0)) if over == "zero" else (f.mean(0), e.mean(0))

    def edit(y: Tensor, where: Any) -> Tensor:
        site, sae = where.site, saes[where.site]
        f, e, passed = parts(sae, y if reads[site] == site else where.read[reads[site]], y, clean.ids)
        f = torch.where(kept[site][:, :-1], f, means[site][0])
        e = torch.where(kept[site][:, -1:], e, means[site][1])
        return f @ sae.W_dec + sae.b_dec + e + passed

    with lm.taps(read=[r for s, r in reads.items() if r != s], edit=dict.fromkeys(saes, edit)):
        logits = lm(clean)
    assert logits is not None
    found = ablate_outside(
        lm, saes, [(clean, patch, difference)], [kept], AblationOptions(start_layer=-1, ablation=over)
    )
    close(found.circuits[0], difference(logits[:, -1], torch.arange(N)))
