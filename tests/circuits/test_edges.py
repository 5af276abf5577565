"""Edges against oracles that share nothing with them: a loop over nodes, finite differences, whole Jacobians."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import circuit_loop
from unweave.attribute.attribution import SiteEffects, node_effects
from unweave.attribute.states import change_of, moved_positions, states
from unweave.circuits.about import Options
from unweave.circuits.edges import edge_effects, merge
from unweave.circuits.faithfulness import token_means
from unweave.circuits.graph import Edges
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import Identity, JumpReLU, ReLU, TopK
from unweave.sae.module import SAE

F, N, P = 20, 3, 5
FULL = ["embed", *(f"{point}.{layer}" for layer in range(3) for point in ("attn_add", "mlp_add", "resid_post"))]
FAMILIES = (
    "llama",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
    "olmo2",
    "gemma",
    "gemma3_text",
    "qwen3",
    "phi3",
)


def make_sae(lm: LM, site: str, seed: int = 0, activation: Any = None, read: str | None = None, **options: Any) -> SAE:
    """Random and float64, no parameter at zero."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    d_in, d_out = lm.width(read or site), lm.width(site)
    weights = (draw(d_in, F) / d_in**0.5, draw(F) * 0.3, draw(F, d_out) * 0.3, draw(d_out) * 0.2)
    skip = draw(d_in, d_out) * 0.2 if read else None
    made = SAE(
        *weights, activation or TopK(6), W_skip=skip, read=Site.parse(read or site), write=Site.parse(site), **options
    )
    return made


def make_saes(lm: LM, sites: list[str], **options: Any) -> dict[Site, SAE]:
    return {Site.parse(site): make_sae(lm, site, seed, **options) for seed, site in enumerate(sites)}


def make_pair(n: int = N, width: int = P) -> tuple[Tokens, Tokens]:
    """Two places differ."""
    clean = torch.randint(3, 97, (n, width), generator=torch.Generator().manual_seed(7))
    patch = clean.clone()
    patch[:, 1:3] = (patch[:, 1:3] + 11) % 90 + 3
    return Tokens.of(clean), Tokens.of(patch)


def padded(tokens: Tokens, side: str) -> Tokens:
    """The first row loses two tokens, the second one."""
    mask = torch.ones(N, P, dtype=torch.bool)
    for row, lost in ((0, 2), (1, 1)):
        mask[row, P - lost :] = False
    mask = mask.flip(1) if side == "left" else mask
    return Tokens(tokens.ids, mask, tokens.roles)


def difference(out: Tensor, rows: Tensor) -> Tensor:
    return out[:, 5] - (1.0 + rows.to(out.device)) * out[:, 7]


def changes_by(lm: LM, saes: Mapping[Site, SAE], clean: Tokens, patch: Tokens | None, positions: Tensor | None) -> Any:
    start = states(lm, saes, clean)
    end = states(lm, saes, patch) if isinstance(patch, Tokens) else patch
    moved = moved_positions(clean, positions)
    return {s: change_of(saes[s], start[s], None if end is None else end[s], moved) for s in start}


def retained_by(effects: Mapping[Site, SiteEffects], threshold: float) -> dict[Site, list[tuple[int, int, int]]]:
    return {
        site: [tuple(n) for n in (torch.cat([e.latents, e.error[..., None]], -1).abs() > threshold).nonzero().tolist()]
        for site, e in effects.items()
    }  # type: ignore[return-value]


def loop(
    lm: LM,
    saes: Mapping[Site, SAE],
    clean: Tokens,
    patch: Tokens | None,
    effects: Mapping[Site, SiteEffects],
    threshold: float,
    positions: Tensor | None = None,
) -> dict[tuple[Site, Site], Tensor]:
    """Dense weights [P, F + 1, P, F + 1] by pair of sites, from the loop."""
    width = clean.ids.shape[1]
    saes = dict(sorted(saes.items()))
    graph = circuit_loop.leaves(lm, saes, clean)
    changes = {s: (c.latents, c.error) for s, c in changes_by(lm, saes, clean, patch, positions).items()}
    gradients: Any = {site: e.gradient for site, e in effects.items()}
    found: dict[tuple[Site, Site], Tensor] = {}
    rows = circuit_loop.edge_rows(graph, saes, gradients, changes, retained_by(effects, threshold))
    for up, down, (_, position, slot), weights in rows:
        shape = (width, saes[up].d_sae + 1, width, saes[down].d_sae + 1)
        found.setdefault((up, down), torch.zeros(shape, dtype=torch.float64))[:, :, position, slot] += weights
    return {pair: w for pair, w in found.items() if bool(w.any())}


def dense(edges: Edges, saes: Mapping[Site, SAE], pair: tuple[Site, Site], width: int = P) -> Tensor:
    out = torch.zeros(width, saes[pair[0]].d_sae + 1, width, saes[pair[1]].d_sae + 1, dtype=torch.float64)
    ends = (*edges.up.unbind(1), *edges.down.unbind(1))
    assert bool((edges.weight != 0).all())
    assert len(set(zip(*(e.tolist() for e in ends), strict=True))) == len(edges)
    out[ends] = edges.weight.double()
    return out


def same(ours: Mapping[Any, Edges], theirs: Mapping[Any, Tensor], saes: Mapping[Site, SAE], tolerance: float) -> None:
    mine = {pair: edges for pair, edges in ours.items() if pair[1] is not None}
    assert set(mine) == set(theirs)
    for pair, expected in theirs.items():
        found = dense(mine[pair], saes, pair, expected.shape[0])
        assert float((found - expected).norm() / expected.norm()) < tolerance, pair


def compared(
    lm: LM,
    saes: dict[Site, SAE],
    clean: Tokens,
    patch: Tokens | None,
    threshold: float = 0.06,
    positions: Tensor | None = None,
    tolerance: float = 1e-6,
    **options: Any,
) -> dict[tuple[Site, Site], Tensor]:
    """Ours equal to the loop's; returns the loop's."""
    effects = node_effects(lm, saes, clean, patch, difference, positions=positions)
    expected = loop(lm, saes, clean, patch, effects, threshold, positions)
    found = edge_effects(
        lm, saes, clean, patch, effects, Options(node_threshold=threshold, **options), positions=positions
    )
    same(found, expected, saes, tolerance)
    return expected


# -- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_pairs_equal_the_loop(tiny: Any, family: str) -> None:
    """Attention, MLP and residual stream at every layer, and the embedding: exactly the pairs of the paper."""
    lm = LM(tiny(family).double(), None)
    saes = make_saes(lm, FULL)
    expected = compared(lm, saes, *make_pair())
    pairs = {(str(up), str(down)) for up, down in expected}
    before = ["embed", "resid_post.0", "resid_post.1"]
    wanted = {(a, b) for i, a in enumerate(before) for b in (f"attn_add.{i}", f"mlp_add.{i}", f"resid_post.{i}")}
    wanted |= {(a, f"resid_post.{i}") for i in range(3) for a in (f"attn_add.{i}", f"mlp_add.{i}")}
    if family != "gpt_neox":
        wanted |= {(f"attn_add.{i}", f"mlp_add.{i}") for i in range(3)}
    assert pairs == wanted


SOME = {
    "residual": ["resid_post.0", "resid_post.2"],
    "embedding and top": ["embed", "resid_post.2"],
    "resid_pre": ["resid_pre.0", "resid_pre.2"],
    "mlp": ["mlp_add.0", "mlp_add.1", "mlp_add.2"],
    "attention": ["attn_add.0", "attn_add.2"],
    "heads": ["embed", "attn_heads.0", "attn_heads.1", "resid_post.1", "mlp_out.2"],
    "inside": ["attn_heads.0", "mlp_act.0", "resid_post.0", "attn_out.1", "mlp_act.1", "mlp_out.2"],
    "no attention": ["resid_post.0", "mlp_add.1", "resid_post.1", "mlp_act.2", "resid_post.2"],
    "no mlp": ["embed", "attn_add.0", "attn_heads.1", "resid_post.2"],
}


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("some", SOME)
def test_some_sites_equal_the_loop(tiny: Any, family: str, some: str) -> None:
    lm = LM(tiny(family).double(), None)
    assert compared(lm, make_saes(lm, SOME[some]), *make_pair())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_transcoders_begin_where_they_read(tiny: Any, family: str) -> None:
    lm = LM(tiny(family).double(), None)
    saes = make_saes(lm, ["embed", "attn_add.1", "resid_post.0", "resid_post.1"])
    pairs = [("mlp_in.1", "mlp_add.1"), ("attn_in.2", "attn_add.2"), ("mlp_in.2", "mlp_out.2")]
    saes |= {Site.parse(write): make_sae(lm, write, 9, ReLU(), read) for read, write in pairs}
    expected = compared(lm, saes, *make_pair())
    assert {down for _, down in expected} > {Site.parse(write) for _, write in pairs}


def test_a_skip_goes_around_the_nodes_of_its_transcoder(tiny: Any) -> None:
    """Edges from before a transcoder to behind it: none without a skip, for there everything passes a node."""
    lm = LM(tiny("llama").double(), None)
    clean, patch = make_pair()
    policy = TokenPolicy(exclude_ids=(int(clean.ids[0, 2]), int(clean.ids[1, 3])))
    up, down = Site("embed"), Site("resid_post", 0)
    saes = make_saes(lm, ["embed", "resid_post.0", "resid_post.2"], policy=policy)
    saes |= make_saes(lm, ["attn_add.0"], policy=policy)
    for write, read in (("mlp_add.0", "mlp_in.0"), ("mlp_add.1", "resid_mid.1"), ("attn_add.1", "attn_in.1")):
        saes[Site.parse(write)] = make_sae(lm, write, 3, ReLU(), read, policy=policy)
    with_skip = compared(lm, saes, clean, patch)
    for sae in saes.values():
        sae.W_skip = None
    without = compared(lm, saes, clean, patch)
    assert float((with_skip[up, down] - without[up, down]).abs().max()) > 0.01
    skipping = {Site("resid_post", 0): make_sae(lm, "resid_post.0", 1, ReLU(), "resid_post.0")}
    with pytest.raises(UnweaveError, match="skip in the residual stream"):
        edge_effects(lm, skipping, clean, patch, {}, Options(node_threshold=0.1))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_edges_reach_no_further_than_a_sliding_window(tiny: Any, family: str) -> None:
    """Twelve tokens, of which attention in the first block sees the last eight."""
    lm = LM(tiny(family).double(), None)
    saes = make_saes(lm, ["embed", "attn_add.0", "resid_post.0", "resid_post.2"])
    clean, _ = make_pair(1, 12)
    expected = compared(lm, saes, clean, None, threshold=0.05)
    seen = expected[Site("embed"), Site("attn_add", 0)].abs().sum((1, 3))  # from, to
    back = torch.arange(12).unsqueeze(0) - torch.arange(12).unsqueeze(1)
    assert not bool(seen[(back < 0) | (back >= 8)].any())
    assert bool(seen[back == 7].any())


@pytest.mark.parametrize("activation", [TopK(3), ReLU(), JumpReLU(torch.full((F,), 0.4, dtype=torch.float64))])
@pytest.mark.parametrize("ablate", [False, True])
def test_activations_and_zero_ablation(tiny: Any, activation: Any, ablate: bool) -> None:
    lm = LM(tiny("gpt_neox_sequential").double(), None)
    clean, patch = make_pair()
    compared(lm, make_saes(lm, FULL, activation=activation), clean, None if ablate else patch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trap_01_padding_has_no_part(tiny: Any, family: str, side: str) -> None:
    """Padded rows have the edges that they have alone."""
    lm = LM(tiny(family).double(), None)
    clean, patch = (padded(tokens, side) for tokens in make_pair())
    saes = make_saes(lm, [*FULL[:7], "resid_post.2"])
    compared(lm, saes, clean, patch)
    effects = node_effects(lm, saes, clean, None, difference)
    whole = edge_effects(lm, saes, clean, None, effects, Options(node_threshold=0.02, summed="positions"))
    alone = []
    for row in range(N):
        short = clean.rows(slice(row, row + 1))
        kept = short.mask[0]
        short = Tokens(short.ids[:, kept], short.mask[:, kept], short.roles[:, kept])
        metric = lambda out, rows, row=row: difference(out, rows + row)  # noqa: E731
        found = node_effects(lm, saes, short, None, metric)
        alone.append(edge_effects(lm, saes, short, None, found, Options(node_threshold=0.02, summed="positions")))
    joined = merge(alone)
    assert set(joined) == set(whole)
    same(whole, {p: dense(e, saes, p, 1) for p, e in joined.items() if p[1]}, saes, 1e-6)  # type: ignore[arg-type]


def test_positions_and_excluded_tokens(tiny: Any) -> None:
    """Where the SAE's policy keeps a token out, the error is all there is; positions limit what is patched."""
    lm = LM(tiny("llama").double(), None)
    clean, patch = make_pair()
    policy = TokenPolicy(exclude_ids=tuple(clean.ids[:, 2].tolist()))
    saes = make_saes(lm, FULL, policy=policy)
    positions = torch.rand(N, P, generator=torch.Generator().manual_seed(1)) < 0.6
    compared(lm, saes, clean, patch, positions=positions)
    expected = compared(lm, saes, clean, None)
    looked_at = expected[Site("resid_post", 1), Site("attn_add", 2)]
    assert not bool(looked_at[2, :F].any())
    assert bool(looked_at[2, F].any())


def test_ablation_to_means(tiny: Any) -> None:
    """Latents and errors go to their means over all tokens; a skip transcoder is among the SAEs."""
    lm = LM(tiny("gpt2").double(), None)
    saes = make_saes(lm, ["embed", "resid_post.0", "resid_post.1"])
    saes[Site("mlp_add", 1)] = make_sae(lm, "mlp_add.1", 9, ReLU(), "mlp_in.1")
    clean, _ = make_pair()
    means = token_means(lm, saes, [(clean, None, difference)], skip_first=1)
    whole = states(lm, saes, clean)
    for site, mean in means.items():
        torch.testing.assert_close(mean.latents[0], whole[site].latents[:, 1:].mean((0, 1)))
        torch.testing.assert_close(mean.error[0], whole[site].error[:, 1:].mean((0, 1)))
        torch.testing.assert_close(mean.x[0], whole[site].nodes[:, 1:].mean((0, 1)))
    compared(lm, saes, clean, means)  # type: ignore[arg-type]


def test_neurons_are_all_active(tiny: Any) -> None:
    lm = LM(tiny("gpt2").double(), None)
    compared(
        lm,
        {Site.parse(s): identity(lm, s) for s in ["embed", "mlp_act.1", "resid_post.0", "resid_post.1"]},
        *make_pair(),
    )


def identity(lm: LM, site: str) -> SAE:
    eye = torch.eye(lm.width(site), dtype=torch.float64)
    zero = torch.zeros(len(eye), dtype=torch.float64)
    return SAE(eye, zero, eye, zero, Identity(), read=Site.parse(site), policy=TokenPolicy())


# -- finite differences, with no gradient anywhere --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neox_sequential", "llama", "gemma2", "olmo2"])
def test_edges_equal_path_specific_finite_differences(tiny: Any, family: str) -> None:
    """Move one node a little, hold all others at their clean values, and look at the downstream node."""
    lm = LM(tiny(family).double(), None)
    names = ["embed", "attn_add.0", "mlp_add.0", "resid_post.0", "mlp_act.1", "resid_post.2"]
    saes = make_saes(lm, names, activation=ReLU())
    clean, patch = make_pair()
    effects = node_effects(lm, saes, clean, patch, difference)
    change = changes_by(lm, saes, clean, patch, None)
    start = states(lm, saes, clean)
    one = slice(0, 1)
    alone = {s: SiteEffects(e.latents[one], e.error[one], e.gradient[one]) for s, e in effects.items()}  # type: ignore[index]
    found = edge_effects(lm, saes, clean.rows(one), patch.rows(one), alone, Options(node_threshold=0.0))
    rounding = family in ("llama", "gemma2", "olmo2")  # their norms compute in float32
    step, tolerance = (2e-3, 2e-3) if rounding else (1e-4, 1e-6)
    compared_pairs = 0
    for pair, edges in found.items():
        up, down = pair
        if down is None:
            continue
        order = edges.weight.abs().argsort(descending=True)
        latents, errors = order[(edges.up[order, 1] < F)][:3], order[edges.up[order, 1] == F][:1]
        for e in (*latents.tolist(), *errors.tolist()):
            (q, i), (p, j) = edges.up[e].tolist(), edges.down[e].tolist()
            direction = change[up].latents[0, q, i] * saes[up].W_dec[i] if i < F else change[up].error[0, q]
            ends, smooth = [], True
            for sign in (1, -1):
                held = {s: start[s].x[:1].clone() for s in saes}
                held[up][0, q] += sign * step * direction
                seen: dict[Site, Tensor] = {}

                def hold(x: Tensor, at: Any, held: Any = held, seen: Any = seen) -> Tensor:
                    seen[at.site] = x
                    return held[at.site].to(x.dtype)

                with lm.taps(edit=dict.fromkeys(saes, hold)):
                    lm(clean.rows(one))
                x = seen[down][0, p].double()
                f = saes[down].encode(x)
                smooth &= torch.equal(f > 0, start[down].latents[0, p] > 0)
                g = effects[down].gradient[0, p]  # type: ignore[index]
                ends.append(float(f[j] * (g @ saes[down].W_dec[j]) if j < F else g @ (x - saes[down].decode(f))))
            if not smooth:  # a latent came or went on the way
                continue
            expected = (ends[0] - ends[1]) / (2 * step)
            assert abs(expected - float(edges.weight[e])) < tolerance * max(1.0, abs(expected)), (pair, e)
            compared_pairs += 1
    assert compared_pairs > 20


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_direct_and_mediated_paths_make_up_the_whole_derivative(tiny: Any, family: str) -> None:
    """With coordinates as nodes, edges are Jacobians: products along all ways of a block add up to the block's own."""
    lm = LM(tiny(family).double(), None)
    saes = {Site.parse(s): identity(lm, s) for s in ("embed", "attn_add.0", "mlp_add.0", "resid_post.0")}
    tokens = Tokens.of(torch.randint(3, 97, (1, 3), generator=torch.Generator().manual_seed(3)))
    start = states(lm, saes, tokens)
    D, n = 32, 3 * 32
    ones = torch.ones(1, 3, D, dtype=torch.float64)
    effects = {site: SiteEffects(ones, ones[..., 0] * 0, ones) for site in saes}
    found = edge_effects(lm, saes, tokens, None, effects, Options(node_threshold=0.5))

    def jacobian(up: str, down: str) -> Tensor:
        """[down, up], from weights -J f (zero ablation, all gradients 1)."""
        pair = (Site.parse(up), Site.parse(down))
        if pair not in found:
            return torch.zeros(n, n, dtype=torch.float64)
        weights = dense(found[pair], saes, pair, 3)[:, :D, :, :D]
        return (weights / -start[pair[0]].latents[0][:, :, None, None]).flatten(2).flatten(0, 1).T

    to_attn, to_mlp = jacobian("embed", "attn_add.0"), jacobian("embed", "mlp_add.0")
    direct = jacobian("embed", "resid_post.0")
    torch.testing.assert_close(direct, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(jacobian("mlp_add.0", "resid_post.0"), torch.eye(n, dtype=torch.float64))
    through = jacobian("attn_add.0", "mlp_add.0")
    assert bool(through.any()) == (family != "gpt_neox")
    total = direct + to_attn + to_mlp + through @ to_attn

    def block(x: Tensor) -> Tensor:
        top = Site("resid_post", 0)
        with lm.taps(read=[top], edit={Site("embed"): lambda _x, _at: x}, stop=top, grad=True) as seen:
            lm(tokens)
            return seen[top]

    whole = torch.autograd.functional.jacobian(block, start[Site("embed")].x).reshape(n, n)
    assert float((total - whole).norm() / whole.norm()) < 1e-6
    assert float((total - direct).norm() / whole.norm()) > 0.1


# -- sums, limits and chunks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_summed_is_the_sum_of_unsummed(tiny: Any, family: str) -> None:
    lm = LM(tiny(family).double(), None)
    saes = make_saes(lm, ["resid_post.0", *FULL[4:]])
    clean, patch = make_pair()
    effects = node_effects(lm, saes, clean, patch, difference)
    apart = edge_effects(lm, saes, clean, patch, effects, Options(node_threshold=0.02))
    added = edge_effects(lm, saes, clean, patch, effects, Options(node_threshold=0.02, summed="positions"))
    assert set(apart) == set(added)
    sums = {p: dense(e, saes, p).sum((0, 2))[None, :, None] for p, e in apart.items() if p[1]}  # type: ignore[arg-type]
    same(added, sums, saes, 1e-9)
    last = Site("resid_post", 2)
    expected = torch.cat([effects[last].latents, effects[last].error[..., None]], -1).sum((0, 1))
    found = torch.zeros(F + 1, dtype=torch.float64)
    found[added[last, None].up[:, 1]] = added[last, None].weight
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(float(apart[last, None].weight.sum()), float(expected.sum()))
    assert not bool(added[last, None].down.any())


def test_chunks_change_nothing(tiny: Any, monkeypatch: Any) -> None:
    from unweave.circuits import arrivals, edges

    lm = LM(tiny("gpt2").double(), None)
    saes = make_saes(lm, ["embed", "attn_add.0", "resid_post.0", "mlp_act.1", "resid_post.2"], activation=ReLU())
    clean, patch = make_pair()
    effects = node_effects(lm, saes, clean, patch, difference)
    for summed in ("none", "positions"):
        options = Options(node_threshold=0.02, summed=summed)  # type: ignore[arg-type]
        with monkeypatch.context() as m:
            whole = edge_effects(lm, saes, clean, patch, effects, options)
            m.setattr(edges, "_BUFFER", 300)
            m.setattr(arrivals, "_NUMBERS", 900)
            small = edge_effects(lm, saes, clean, patch, effects, replace(options, max_tokens=7))
        width = P if summed == "none" else 1
        same(small, {p: dense(e, saes, p, width) for p, e in whole.items() if p[1]}, saes, 1e-9)  # type: ignore[arg-type]


def test_dense_and_sparse_products_agree(tiny: Any, monkeypatch: Any) -> None:
    from unweave.circuits.arrivals import Arrivals

    lm = LM(tiny("gpt2").double(), None)
    saes = make_saes(lm, FULL[:7])
    clean, patch = make_pair()
    effects = node_effects(lm, saes, clean, patch, difference)
    ways: list[Any] = []
    with monkeypatch.context() as m:
        m.setattr(Arrivals, "_prefers_dense", lambda self, *_: False)
        ways.append(edge_effects(lm, saes, clean, patch, effects, Options(node_threshold=0.02)))
        m.setattr(Arrivals, "_prefers_dense", lambda self, *_: True)
        ways.append(edge_effects(lm, saes, clean, patch, effects, Options(node_threshold=0.02)))
    same(ways[0], {p: dense(e, saes, p) for p, e in ways[1].items() if p[1]}, saes, 1e-9)


def test_upstream_is_a_filter(tiny: Any) -> None:
    lm = LM(tiny("gpt2").double(), None)
    saes = make_saes(lm, FULL[:7])
    clean, patch = make_pair()
    effects = node_effects(lm, saes, clean, patch, difference)
    g = torch.Generator().manual_seed(0)
    for width in (1, P):
        allowed = {site: torch.rand(width, F + 1, generator=g) < 0.4 for site in list(saes)[:5]}
        allowed[Site("resid_post", 1)] = torch.rand(width, F + 1, generator=g) < 0.4
        whole = edge_effects(lm, saes, clean, patch, effects, Options(node_threshold=0.02))
        part = edge_effects(lm, saes, clean, patch, effects, Options(node_threshold=0.02), upstream=allowed)
        expected = {}
        for pair, edges in whole.items():
            keep = torch.ones(len(edges), dtype=torch.bool)
            if pair[0] in allowed:
                keep = allowed[pair[0]].expand(P, -1)[edges.up.unbind(1)]
            expected[pair] = Edges(edges.up[keep], edges.down[keep], edges.weight[keep])
        top = (Site("resid_post", 1), None)
        assert torch.equal(part[top].up, expected[top].up)
        same(part, {p: dense(e, saes, p) for p, e in expected.items() if p[1] and len(e)}, saes, 1e-9)  # type: ignore[arg-type]


def test_merge_adds(tiny: Any) -> None:
    lm = LM(tiny("gpt2").double(), None)
    saes = make_saes(lm, FULL[:4])
    clean, patch = make_pair()
    effects = node_effects(lm, saes, clean, patch, difference)
    whole = edge_effects(lm, saes, clean, patch, effects, Options(node_threshold=0.02))
    parts = []
    for rows in (slice(0, 2), slice(2, 3)):
        part = {s: SiteEffects(e.latents[rows], e.error[rows], e.gradient[rows]) for s, e in effects.items()}  # type: ignore[index]
        parts.append(edge_effects(lm, saes, clean.rows(rows), patch.rows(rows), part, Options(node_threshold=0.02)))
    same(merge(parts), {p: dense(e, saes, p) for p, e in whole.items() if p[1]}, saes, 1e-9)  # type: ignore[arg-type]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_edges_refuse(tiny: Any) -> None:
    lm = LM(tiny("gpt2"), None)
    clean, patch = make_pair()

    def attempt(saes: dict[Site, SAE], said: str, effects: Any = None, upstream: Any = None, **options: Any) -> None:
        effects = effects or node_effects(lm, saes, clean, patch, difference)
        with pytest.raises(UnweaveError, match=said):
            edge_effects(lm, saes, clean, patch, effects, Options(**options), upstream=upstream)

    for site in ("mlp_in.1", "resid_mid.1", "attn_in.0"):
        attempt(make_saes(lm, [site]), "are not defined")
    attempt(make_saes(lm, ["attn_heads.1", "attn_add.1"]), "same place")
    attempt(make_saes(lm, ["resid_post.0", "resid_pre.1"]), "same place")
    site = Site("mlp_add", 2)
    attempt({site: make_sae(lm, "mlp_add.2", read="resid_post.0")}, "cannot follow a transcoder")
    saes = make_saes(lm, ["resid_post.0", "resid_post.1"])
    effects = node_effects(lm, saes, clean, patch, difference)
    exact = {s: SiteEffects(e.latents, e.error, None) for s, e in effects.items()}
    attempt(saes, "exact effects have none", exact)
    attempt(saes, "no node effects", {Site("resid_post", 0): effects[Site("resid_post", 0)]})
    short = {s: SiteEffects(e.latents[:1], e.error[:1], e.gradient[:1]) for s, e in effects.items()}  # type: ignore[index]
    attempt(saes, "do not belong to these inputs", short)
    nan = {s: SiteEffects(e.latents * float("nan"), e.error, e.gradient) for s, e in effects.items()}
    attempt(saes, "NaN", nan)
    attempt(saes, "threshold", effects, node_threshold=float("nan"))
    attempt(saes, "summed", effects, summed="examples")
    attempt(saes, "upstream slots", effects, upstream={Site("resid_post", 0): torch.ones(1, F, dtype=torch.bool)})
    attempt(saes, "upstream slots", effects, upstream={Site("resid_post", 2): torch.ones(1, F + 1, dtype=torch.bool)})
    normed = make_saes(lm, ["resid_post.0"], input_norm="layer_norm")
    attempt(normed, "normalises every token", effects)


@pytest.mark.parametrize(
    ("sites", "ends"),
    [
        (FULL, ["resid_post.2"]),
        (["embed", "mlp_add.0", "resid_post.1", "mlp_add.1"], ["resid_post.1"]),
        (["resid_pre.2", "mlp_add.0", "attn_add.2", "mlp_add.2"], ["resid_pre.2", "attn_add.2", "mlp_add.2"]),
        (["mlp_add.0", "mlp_add.2"], ["mlp_add.0", "mlp_add.2"]),
        (["embed", "attn_add.1"], ["embed", "attn_add.1"]),
    ],
)
@pytest.mark.parametrize("summed", ["none", "positions"])
def test_edges_to_the_metric_come_from_the_last_residual_site_and_all_above_it(
    tiny: Any, sites: list[str], ends: list[str], summed: Any
) -> None:
    lm = LM(tiny("gpt2").double(), None)
    saes = make_saes(lm, sites)
    clean, patch = make_pair()
    effects = node_effects(lm, saes, clean, patch, difference)
    found = edge_effects(lm, saes, clean, patch, effects, Options(node_threshold=0.1, summed=summed))
    assert {up for up, down in found if down is None} == {Site.parse(site) for site in ends}
    for site in map(Site.parse, ends):
        weights = torch.cat([effects[site].latents, effects[site].error[..., None]], -1).sum(0)
        weights = weights.sum(0, keepdim=True) if summed == "positions" else weights
        dense = torch.zeros_like(weights)
        dense[found[site, None].up.unbind(1)] = found[site, None].weight
        torch.testing.assert_close(dense, weights)


def test_nothing_above_the_threshold_is_nothing(tiny: Any) -> None:
    lm = LM(tiny("gpt2"), None)
    saes = make_saes(lm, FULL)
    clean, patch = make_pair()
    effects = node_effects(lm, saes, clean, patch, difference)
    assert set(edge_effects(lm, saes, clean, patch, effects, Options(node_threshold=1e9))) == {
        (Site("resid_post", 2), None)
    }
    flat = edge_effects(
        lm, saes, clean, clean, node_effects(lm, saes, clean, clean, difference), Options(node_threshold=0.0)
    )
    assert flat == {}
