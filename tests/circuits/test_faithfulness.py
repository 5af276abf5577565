"""Faithfulness against ablations written out by hand, one example at a time, on tiny models of several families."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from unweave.circuits.about import AblationOptions
from unweave.circuits.faithfulness import Ablated, _Circuits, ablate_outside
from unweave.circuits.graph import Circuit
from unweave.core.errors import UnweaveError
from unweave.core.result import from_plain, to_plain
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.methods.circuits.result import Errors, RandomNodes, Row, Sweep
from unweave.methods.circuits.sweep import PAPER_THRESHOLDS, SweepOptions, spread_thresholds, sweep
from unweave.sae.activations import JumpReLU, TopK
from unweave.sae.module import SAE
from unweave.sae.neurons import neurons

F = 20
N, P = 4, 5
NAMES = ("embed", "attn_add.1", "mlp_add.1", "resid_post.1", "attn_heads.2", "mlp_add.2", "resid_post.2")


def make_sae(lm: LM, site: str, seed: int, read: str | None = None) -> SAE:
    """Random and float64, no parameter zero; some tokens are excluded by the policy, whose latents are 0 there.

    Of four SAEs one has so few active latents that its sums are sparse.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    d_in, d = lm.width(read or site), lm.width(site)
    weights = (draw(d_in, F) / d_in**0.5, draw(F) * 0.3, draw(F, d) * 0.3, draw(d) * 0.2)
    activation = TopK(6 if seed % 4 == 1 else 1) if seed % 2 else JumpReLU(torch.full((F,), 0.3, dtype=torch.float64))
    where = {"read": Site.parse(read or site), "write": Site.parse(site)}
    skip = draw(d_in, d) * 0.2 if read else None
    return SAE(*weights, activation, **where, W_skip=skip, policy=TokenPolicy(exclude_ids=(9,)))


def saes_of(lm: LM, names: tuple[str, ...] = NAMES) -> dict[Site, SAE]:
    return {Site.parse(name): make_sae(lm, name, seed) for seed, name in enumerate(names)}


def difference(out: Tensor, rows: Tensor) -> Tensor:
    """A metric that is another for every example."""
    return out[:, 5] - (1.0 + 0.3 * rows.to(out.device)) * out[:, 7]


def pair(width: int = P, seed: int = 7) -> tuple[Tokens, Tokens]:
    clean = torch.randint(10, 97, (N, width), generator=torch.Generator().manual_seed(seed))
    clean[0, 1] = 9
    patch = clean.clone()
    patch[:, 2] = (patch[:, 2] + 11) % 80 + 10
    return Tokens.of(clean), Tokens.of(patch)


def kept_sets(saes: dict[Site, SAE], width: int, seed: int, share: float = 0.5) -> dict[Site, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {site: torch.rand(width, sae.d_sae + 1, generator=g) < share for site, sae in sorted(saes.items())}


def parts(sae: SAE, source: Tensor, x: Tensor, token: int) -> tuple[Tensor, Tensor]:
    f = sae.encode(source) if token != 9 else torch.zeros(sae.d_sae, dtype=x.dtype)
    return f, x - sae.decode(f) - around(sae, source, token)


def around(sae: SAE, source: Tensor, token: int) -> Tensor:
    """What a skip says, at tokens that the policy keeps."""
    return torch.zeros(sae.d_out).double() if sae.W_skip is None or token == 9 else source @ sae.W_skip


def by_hand(
    lm: LM,
    saes: dict[Site, SAE],
    clean: Tokens,
    means_over: Tokens | dict[Site, tuple[Tensor, Tensor]] | None,
    kept: dict[Site, Tensor],
    first: int,
    skip: int = 0,
) -> Tensor:
    """m(C) of each example: one row, one site, one position, one latent at a time. ``means_over`` None: zero; means by
    site are those of every position. The first ``skip`` positions stay."""

    def layer(site: Site) -> int:
        return -1 if site.layer is None else site.layer

    reads = [sae.read for sae in saes.values() if sae.read is not None]
    means: dict[tuple[Site, int], tuple[Tensor, Tensor]] = {}
    seen: list[dict[Site, Tensor]] = []
    for row in range(N if isinstance(means_over, Tokens) else 0):
        with lm.taps(read=[*saes, *reads]) as values_here:
            lm(means_over.rows(slice(row, row + 1)))  # type: ignore[union-attr]
        seen.append(dict(values_here))
    for site, sae in saes.items():
        for position in range(clean.ids.shape[1]):
            if means_over is None:
                means[site, position] = torch.zeros(sae.d_sae).double(), torch.zeros(sae.d_out).double()
                continue
            if isinstance(means_over, dict):
                means[site, position] = means_over[site]
                continue
            found = []
            for row, at in enumerate(seen):
                token = int(means_over.ids[row, position])
                found.append(parts(sae, at[sae.read or site][0, position], at[site][0, position], token))
            means[site, position] = sum(f for f, _ in found) / N, sum(e for _, e in found) / N
    values = []
    for row in range(len(clean)):

        def edit(x: Tensor, at: Any, row: int = row) -> Tensor:
            site, sae = at.site, saes[at.site]
            source = x if sae.read in (None, site) else at.read[sae.read]
            new = x.clone()
            for position in range(skip, x.shape[1]):
                token = int(clean.ids[row, position])
                f, e = parts(sae, source[0, position], x[0, position], token)
                mean_f, mean_e = means[site, position]
                keep = kept[site][position if len(kept[site]) > 1 else 0]
                g = torch.stack([f[j] if keep[j] else mean_f[j] for j in range(sae.d_sae)])
                skip_says = around(sae, source[0, position], token)
                new[0, position] = sae.decode(g) + skip_says + (e if keep[-1] else mean_e)
            return new

        edits = {site: edit for site in saes if layer(site) >= first}
        with lm.taps(read=reads, edit=edits):
            logits = lm(clean.rows(slice(row, row + 1)))
        assert logits is not None
        values.append(difference(logits[:, -1], torch.tensor([row])))
    return torch.cat(values)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


FAMILIES = {"llama": 1e-5, "gemma2": 1e-5, "gpt2": 1e-9, "gpt_neox": 1e-9}  # RMS norms go through float32


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_is_what_it_is_by_hand(tiny: Any, family: str) -> None:
    """Latents downstream are those of the stream as it already is; the pass may begin at the start layer."""
    lm = LM(tiny(family).double(), None)
    saes = saes_of(lm)
    clean, patch = pair()
    for first, width in ((-1, P), (2, 1)):
        kept = kept_sets(saes, width, first + 5)
        found = ablate_outside(
            lm, saes, [(clean, patch, difference)], [kept], AblationOptions(start_layer=first, max_tokens=2 * P)
        )
        close(found.circuits[0], by_hand(lm, saes, clean, patch, kept, first), FAMILIES[family])
        nothing = {site: torch.zeros(1, sae.d_sae + 1, dtype=torch.bool) for site, sae in saes.items()}
        close(found.empty, by_hand(lm, saes, clean, patch, nothing, first), FAMILIES[family])
        logits = lm(clean)
        assert logits is not None
        close(found.model, difference(logits[:, -1], torch.arange(N)))
        gap = (found.model.mean() - found.empty.mean()).abs()
        assert gap > 1e-3 and (found.circuits[0].mean() - found.empty.mean()).abs() > 1e-3 * gap


def test_other_means_and_transcoders(tiny: Any) -> None:
    lm = LM(tiny("gpt2").double(), None)
    saes = saes_of(lm, ("resid_post.0", "resid_post.1")) | {
        Site("mlp_add", 1): make_sae(lm, "mlp_add.1", 5, read="mlp_in.1"),
        Site("mlp_add", 2): make_sae(lm, "mlp_add.2", 4, read="resid_post.1"),  # an edited site
    }
    clean, patch = pair()
    kept = kept_sets(saes, P, 3)
    found = {}
    for ablation, over in (("patch", patch), ("clean", clean), ("zero", None)):
        (found[ablation],) = ablate_outside(
            lm, saes, [(clean, patch, difference)], [kept], AblationOptions(ablation=ablation, start_layer=1)
        ).circuits
        close(found[ablation], by_hand(lm, saes, clean, over, kept, 1))
    assert (found["patch"] - found["clean"]).abs().max() > 1e-4 < (found["zero"] - found["clean"]).abs().max()


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_single_texts_of_many_lengths_have_one_mean_over_all_their_tokens(tiny: Any, side: Any, skip: int) -> None:
    """Padded together or alone in their lengths; tokens that are skipped are in no mean."""
    lm = LM(tiny("gpt2").double(), None)
    saes = saes_of(lm, ("embed", "mlp_add.1", "resid_post.1"))
    g = torch.Generator().manual_seed(5)
    texts = [torch.randint(10, 97, (length,), generator=g).tolist() for length in (3, 7, 5, 4)]
    texts[1][4] = 9
    found: dict[Site, list[tuple[Tensor, Tensor]]] = {site: [] for site in saes}
    for text in texts:
        with lm.taps(read=list(saes)) as seen:
            lm(Tokens.of(torch.tensor([text])))
        for site, sae in saes.items():
            found[site] += [parts(sae, seen[site][0, i], seen[site][0, i], text[i]) for i in range(skip, len(text))]
    means: dict[Site, Any] = {
        s: (sum(f for f, _ in at) / len(at), sum(e for _, e in at) / len(at)) for s, at in found.items()
    }
    assert all(len(at) == 19 - 4 * skip for at in found.values())
    padded = Tokens.pad([(text, [4] * len(text)) for text in texts[:3]], 2, side)
    batches = [(padded, None, difference), (Tokens.of(torch.tensor(texts[3:])), None, difference)]
    kept = kept_sets(saes, 1, 3)
    nothing = {site: torch.zeros(1, F + 1, dtype=torch.bool) for site in saes}
    result = ablate_outside(
        lm,
        saes,
        batches,
        [kept],
        AblationOptions(start_layer=-1, ablation="clean", skip_first=skip, max_tokens=8),
        means="tokens",
    )
    for sets, values in ((kept, result.circuits[0]), (nothing, result.empty)):
        wanted = []
        for text, number in zip(texts, (0, 1, 2, 0), strict=True):
            whole = Tokens.of(torch.tensor([text] * (number + 1)))  # the metric goes by the row's number
            wanted.append(by_hand(lm, saes, whole, means, sets, -1, skip)[number])
        close(values, torch.stack(wanted))
    apart = ablate_outside(
        lm, saes, batches, [kept], AblationOptions(start_layer=-1, ablation="clean", skip_first=skip)
    )
    assert (apart.circuits - result.circuits).abs().max() > 1e-4


def test_first_tokens_that_the_search_skipped_stay_whatever_is_kept(tiny: Any) -> None:
    lm = LM(tiny("gpt2").double(), None)
    saes = saes_of(lm, ("embed", "mlp_add.1", "resid_post.1"))
    clean, patch = pair()
    patch = Tokens.of(torch.cat([patch.ids[:, :1].flip(0), patch.ids[:, 1:]], 1))  # what is skipped differs too
    kept = kept_sets(saes, P, 3)
    nothing = {site: torch.zeros(1, F + 1, dtype=torch.bool) for site in saes}
    everything = {site: ~nodes for site, nodes in nothing.items()}
    batches = [(clean, patch, difference)]
    found = ablate_outside(
        lm, saes, batches, [kept, everything], AblationOptions(start_layer=-1, skip_first=2, max_tokens=2 * P)
    )
    close(found.circuits[0], by_hand(lm, saes, clean, patch, kept, -1, 2))
    close(found.empty, by_hand(lm, saes, clean, patch, nothing, -1, 2))
    close(found.circuits[1], found.model)
    whole = ablate_outside(lm, saes, batches, [kept], AblationOptions(start_layer=-1))
    assert (whole.circuits[0] - found.circuits[0]).abs().max() > 1e-4
    with pytest.raises(UnweaveError, match="first 5"):
        ablate_outside(lm, saes, batches, [kept], AblationOptions(skip_first=P))


def test_kept_sets_may_lie_on_any_device(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is moved before they are put together: the empty one is on the CPU, a sweep's are where the model is."""
    lm = LM(tiny("gpt2"), None)
    saes = saes_of(lm, ("resid_post.1",))
    site = Site("resid_post", 1)
    kept = [torch.zeros(1, F + 1, dtype=torch.bool), torch.ones(P, F + 1, dtype=torch.bool, device="meta")]
    stack = torch.stack

    def strict(tensors: Any) -> Tensor:
        assert {x.device.type for x in tensors} == {"meta"}
        return stack(tensors)

    monkeypatch.setattr(torch, "stack", strict)
    found = _Circuits(SimpleNamespace(device=torch.device("meta")), saes, [{site: nodes} for nodes in kept])  # type: ignore[arg-type]
    assert found.at[site].shape == (2, P, F + 1) and found.at[site].device.type == "meta"


def test_all_is_one_none_is_nought_and_batches_do_not_matter(tiny: Any) -> None:
    """F(M) = 1 and F(empty) = 0; groups of equal length have means of their own, however they are batched."""
    lm = LM(tiny("llama").double(), None)
    saes = saes_of(lm)
    whole = [(*pair(), difference), (*pair(7, 8), difference)]

    def part(batch: Any, rows: slice) -> Any:
        first = rows.start
        return batch[0].rows(rows), batch[1].rows(rows), lambda out, at: difference(out, at + first)

    split = [part(whole[1], slice(0, 1)), part(whole[0], slice(0, 3)), part(whole[1], slice(1, 4))]
    split.append(part(whole[0], slice(3, 4)))
    everything = {site: torch.ones(1, sae.d_sae + 1, dtype=torch.bool) for site, sae in saes.items()}
    some, nothing = kept_sets(saes, 1, 2), {site: ~kept for site, kept in everything.items()}
    a = ablate_outside(lm, saes, whole, [everything, some, nothing])
    b = ablate_outside(lm, saes, split, [everything, some, nothing], AblationOptions(max_tokens=1))
    close(a.faithfulness[[0, 2]], torch.tensor([1.0, 0.0], dtype=torch.float64), 1e-7)
    assert float(a.faithfulness[1]) not in (0.0, 1.0)
    close(a.faithfulness, b.faithfulness, 1e-6)
    close(a.circuits[:, [4, 0, 1, 2, 5, 6, 7, 3]], b.circuits, 1e-6)
    assert torch.equal(a.model, a.circuits[0]) or float((a.model - a.circuits[0]).abs().max()) < 1e-6


def test_trap_a_metric_that_does_not_change_is_an_error_not_infinity(tiny: Any) -> None:
    lm = LM(tiny("gpt2").double(), None)
    saes = saes_of(lm, ("resid_post.1",))
    clean, patch = pair()
    kept = kept_sets(saes, 1, 0)
    same = ablate_outside(lm, saes, [(clean, patch, lambda out, rows: out[:, 0] * 0 + 3.0)], [kept])
    with pytest.raises(UnweaveError, match="nothing is left for a circuit"):
        _ = same.faithfulness
    zero = Ablated(torch.zeros(1, 2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(UnweaveError, match="nothing is left"):
        _ = zero.faithfulness


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    lm = LM(tiny("gpt2").double(), None)
    saes = saes_of(lm, ("resid_post.0", "resid_post.1"))
    clean, patch = pair()
    good = kept_sets(saes, 1, 0)
    batch = (clean, patch, difference)

    def refused(
        words: str, kept: Any = good, batches: Any = (batch,), means: Any = "positions", **options: Any
    ) -> None:
        with pytest.raises(UnweaveError, match=words):
            ablate_outside(lm, saes, list(batches), [kept], AblationOptions(**options), means)

    refused("misses it", {Site("resid_post", 0): good[Site("resid_post", 0)]})
    refused("not bool", {site: kept[:, :-1] for site, kept in good.items()})
    refused("not bool", {site: kept.float() for site, kept in good.items()})
    refused("3 positions", kept_sets(saes, 3, 0))
    refused("no examples", batches=())
    refused("layer 2", start_layer=2)
    refused("median", ablation="median")
    refused("words", means="words")
    refused("no patch", batches=[(clean, None, difference)])
    refused("NaN or infinite", batches=[(clean, patch, lambda out, rows: out[:, 0] / 0)])
    clean_means = ablate_outside(lm, saes, [(clean, None, difference)], [good], AblationOptions(ablation="clean"))
    assert clean_means.circuits.shape == (1, N)


# -- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept() -> Any:
    from helpers.models import build_tiny

    lm = LM(build_tiny("gpt2").double(), None)
    saes = saes_of(lm)
    g = torch.Generator().manual_seed(4)
    nodes = {}
    for site, sae in saes.items():
        effects = torch.randn(P, sae.d_sae + 1, generator=g) * 0.2
        effects[:, ::3] = 0
        effects[:, -1] = 0.3 * torch.randn(P, generator=g)
        nodes[site] = effects
    return lm, saes, Circuit(nodes, {}, True, N), [(*pair(), difference)]


@pytest.mark.parametrize("errors", get_args(Errors))
def test_a_sweep_keeps_what_its_threshold_and_errors_say(swept: Any, errors: Any) -> None:
    lm, saes, circuit, batches = swept
    found = sweep(
        lm, saes, batches, circuit, SweepOptions(start_layer=1, errors=errors, draws=0), thresholds=(0.4, 0.1)
    )
    assert [row.threshold for row in found.rows] == [0.1, 0.4]
    for row in found.rows:
        kept = {site: nodes.abs() > row.threshold for site, nodes in circuit.nodes.items()}
        other = {site: ~nodes for site, nodes in kept.items()}
        for sets in (kept, other):
            for site, nodes in sets.items():
                if errors == "keep":
                    nodes[:, -1] = True
                elif errors == "remove" or (errors == "remove-attn-mlp" and not site.point.startswith("resid")):
                    nodes[:, -1] = False
        wanted = ablate_outside(lm, saes, batches, [kept, other], AblationOptions(start_layer=1)).faithfulness
        close(torch.tensor([row.faithfulness, row.completeness], dtype=torch.float64), wanted)
        inside = {site: nodes for site, nodes in kept.items() if site.layer is not None}
        assert row.latents == sum(int(nodes[:, :-1].sum()) for nodes in inside.values())
        assert row.errors == sum(int(nodes[:, -1].sum()) for nodes in inside.values())
        assert row.nodes == row.latents + row.errors and row.random is None


def test_random_circuits_are_as_large_and_drawn_among_nodes_that_change(
    swept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, saes, circuit, batches = swept
    seen: list[Any] = []

    def look(*args: Any, **options: Any) -> Any:
        seen.extend(args[3])
        return ablate_outside(*args, **options)

    monkeypatch.setattr("unweave.methods.circuits.sweep.ablate_outside", look)
    found = sweep(lm, saes, batches, circuit, SweepOptions(draws=3, seed=1), thresholds=(0.1, 0.4))
    assert len(seen) == 2 + 2 + 6
    for i, row in enumerate(found.rows):
        drawn = seen[4 + 3 * i : 7 + 3 * i]
        for kept in drawn:
            latents = sum(int(nodes[:, :-1].sum()) for nodes in kept.values())
            assert (latents, sum(int(n[:, -1].sum()) for n in kept.values())) == (row.latents, row.errors)
            assert not any(bool((nodes & (circuit.nodes[site] == 0)).any()) for site, nodes in kept.items())
        assert any(not torch.equal(drawn[0][site], drawn[1][site]) for site in drawn[0])
        wanted = ablate_outside(lm, saes, batches, drawn).faithfulness.mean()
        assert row.random is not None and row.random.draws == 3
        assert row.random.mean == pytest.approx(float(wanted), abs=1e-9)
    again = sweep(lm, saes, batches, circuit, SweepOptions(draws=3, seed=1), thresholds=(0.1, 0.4))
    other = sweep(lm, saes, batches, circuit, SweepOptions(draws=3, seed=2), thresholds=(0.1, 0.4))
    assert again == found != other
    assert found.changing == sum(int((e != 0).sum()) for site, e in circuit.nodes.items() if site.layer is not None)


def test_a_sweep_takes_means_that_its_texts_allow_and_skips_what_the_search_skipped(
    swept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mean over all tokens for single texts whose positions were summed; position by position otherwise."""
    lm, saes, circuit, batches = swept
    summed = dataclasses.replace(
        circuit, nodes={s: e.sum(0, keepdim=True) for s, e in circuit.nodes.items()}, positions=False
    )
    single = [(clean, None, metric) for clean, _, metric in batches]
    asked: list[tuple[str, int]] = []

    def look(*args: Any, **options: Any) -> Any:
        asked.append((args[5], args[4].skip_first))
        return ablate_outside(*args, **options)

    monkeypatch.setattr("unweave.methods.circuits.sweep.ablate_outside", look)
    options = SweepOptions(draws=0, skip_first=1, ablation="clean")
    swept_ways = [
        sweep(lm, saes, texts, of, options, thresholds=(0.1,))
        for texts in (batches, single)
        for of in (circuit, summed)
    ]
    assert asked == [("positions", 1)] * 3 + [("tokens", 1)] == [(s.means, s.skip_first) for s in swept_ways]
    assert swept_ways[2].rows != swept_ways[3].rows
    assert from_plain(Sweep, json.loads(json.dumps(to_plain(swept_ways[3]))), "here") == swept_ways[3]


def test_neurons_have_no_errors_and_all_of_them_are_the_model(swept: Any) -> None:
    lm, _, _, batches = swept
    sites = ("mlp_add.1", "resid_post.1")
    units = {Site.parse(site): neurons(lm, site) for site in sites}
    units = {site: SAE(s.W_enc.double(), s.b_enc.double(), s.W_dec.double(), s.b_dec.double(), s.activation,
                       read=site) for site, s in units.items()}  # fmt: skip
    nodes = {site: torch.cat([torch.ones(1, sae.d_sae), torch.zeros(1, 1)], 1) for site, sae in units.items()}
    found = sweep(lm, units, batches, Circuit(nodes, {}, False, N), thresholds=(0.5, 2.0))
    assert found.rows[0].faithfulness == pytest.approx(1, abs=1e-9) == found.rows[1].completeness
    assert found.rows[1].faithfulness == pytest.approx(0, abs=1e-9) == found.rows[0].completeness
    assert (found.rows[0].latents, found.rows[0].errors, found.rows[1].nodes) == (64, 0, 0)


def test_sweeps_refuse_what_makes_no_sense(swept: Any) -> None:
    lm, saes, circuit, batches = swept
    for thresholds in ((), (-1.0,)):
        with pytest.raises(UnweaveError, match="a sweep needs"):
            sweep(lm, saes, batches, circuit, thresholds=thresholds)
    for name, value in (("errors", "some"), ("draws", -1)):
        with pytest.raises(UnweaveError, match=f"{name} must be"):
            SweepOptions(**{name: value})  # type: ignore[arg-type]
    less = {site: e for site, e in circuit.nodes.items() if site != Site("resid_post", 2)}
    with pytest.raises(UnweaveError, match=r"no effects at resid_post\.2"):
        sweep(lm, saes, batches, dataclasses.replace(circuit, nodes=less))


def test_thresholds_are_spread_over_the_range_of_effects(swept: Any) -> None:
    _, _, circuit, _ = swept
    sites = [site for site in circuit.nodes if site.layer is not None]
    found = spread_thresholds(circuit, sites, 8)
    counts = [sum(int((circuit.nodes[site].abs() > t).sum()) for site in sites) for t in found]
    changing = sum(int((circuit.nodes[site] != 0).sum()) for site in sites)
    assert (counts[0], counts[-1], len(counts)) == (1, changing, 8)
    steps = [math.log(b / a) for a, b in pairwise(counts[2:])]
    assert max(steps) < 1.3 * min(steps)
    assert PAPER_THRESHOLDS[0] == pytest.approx(1e-4) and PAPER_THRESHOLDS[-1] == 1.0 and len(PAPER_THRESHOLDS) == 15


def test_the_number_of_nodes_for_a_level_is_read_off_the_curve() -> None:
    numbers = ((0.1, 1000, 1.0), (0.2, 100, 0.9), (0.3, 10, 0.5))
    rows = [Row(t, n, n, 0, f, 0.0, RandomNodes(f / 2, f / 4, f, 2)) for t, n, f in numbers]
    found = Sweep(False, "default", tuple(rows), 1.0, 0.0, 4, 0, "patch", "positions", 0, 2000)
    assert found.nodes_for(0.7) == pytest.approx(10**1.5)
    assert found.nodes_for(0.9) == pytest.approx(100)
    assert found.nodes_for(0.4) == 10
    assert found.nodes_for(1.2) is None
    assert found.random_nodes_for(0.45) == pytest.approx(100)
