"""RAVEL on planted attributes: scores known in advance, swaps as defined, and a model's own completions."""

from __future__ import annotations

import json

import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.site import Site
from unweave.data.pack import Row
from unweave.data.policy import TokenPolicy
from unweave.lm.chat import encode_texts
from unweave.methods.saebench import ravel
from unweave.methods.saebench.baselines import random_directions
from unweave.methods.saebench.facts import Fact, Known, Pairs, facts, says
from unweave.methods.saebench.planted import Planted
from unweave.methods.saebench.ravel import Prompted, Swap, shares, subspace, trained
from unweave.methods.saebench.spec import RavelSpec, SaebenchSpec
from unweave.methods.saebench.task import Bench
from unweave.sae.activations import ReLU, TopK
from unweave.sae.module import SAE

VALUES, ENTITIES = 5, 60
SITE = Site("resid_post", 1)


class World:
    """Entities with two attributes; a prompt asks for one of them, and is answered by reading its directions."""

    def __init__(self):
        self.planted = Planted.drawn([-1] * (2 * VALUES + ENTITIES), 96)
        self.facts, features = [], []
        for entity in range(ENTITIES):
            values = (entity % VALUES, VALUES + entity // VALUES % VALUES)
            f = torch.zeros(2 * VALUES + ENTITIES)
            f[[*values, 2 * VALUES + entity]] = 1
            for attribute, value in zip("AB", values, strict=True):
                self.facts.append(Fact("thing", attribute, f"e{entity}", (f"v{value}",), "of {} it is"))
                features.append(f)
        self.x = torch.stack(features) @ self.planted.directions
        self.first = torch.tensor([int(one.names[0][1:]) for one in self.facts])

    def logits(self, prompts, added):
        read = (self.x[prompts] + added) @ self.planted.directions[: 2 * VALUES].T
        asked = torch.tensor([0 if self.facts[i].attribute == "A" else VALUES for i in prompts.tolist()])
        place = torch.arange(2 * VALUES)
        other = (place < asked[:, None]) | (place >= asked[:, None] + VALUES)
        return 8 * read - 100.0 * other

    def completions(self, prompts, added):
        return [f" v{i}" for i in self.logits(prompts, added).argmax(1).tolist()]

    def disentangled(self):
        """A latent for each value; entities are the error."""
        v = self.planted.directions[: 2 * VALUES]
        return SAE(v.T, torch.full((2 * VALUES,), -1e-5), v, torch.zeros(96), ReLU())

    def absorbed(self):
        """A latent for each pair of values: no latent holds one attribute alone."""
        v = self.planted.directions
        both = torch.stack([v[a] + v[VALUES + b] for a in range(VALUES) for b in range(VALUES)])
        return SAE(both.T, torch.full((len(both),), -1.5), 2 * both, torch.zeros(96), ReLU())


@pytest.fixture(scope="module")
def world():
    return World()


def scored(world, sae, form="correct", seed=0):
    swap, options = Swap.of(sae, world.x, keep_error=form == "correct"), RavelSpec(pairs=80)
    known, names = Known.of(world.facts), [one.names for one in world.facts]
    problems = known.problems(options.pairs, seed, form, world.first)
    masks = trained(world, swap, [train for train, _ in problems.values()], world.first, options, form, seed, 50)
    scores = []
    for (_, test), mask in zip(problems.values(), masks, strict=True):
        added = swap.added(test, mask[None].float(), torch.zeros(len(test), dtype=torch.int64))
        scores.append(shares(world, test, added, names, form))
    return torch.tensor(scores), masks


@pytest.mark.parametrize("form", ["correct", "compatible"])
def test_a_disentangled_sae_reaches_one_and_others_no_more_than_nothing(world, form):
    scores, masks = scored(world, world.disentangled(), form)
    assert (scores == 1).all()
    assert masks[0, :VALUES].all() and not masks[0, VALUES:].any()
    assert masks[1, VALUES:].all() and not masks[1, :VALUES].any()
    for other in (world.absorbed(), random_directions(world.disentangled(), world.x, seed=3)):
        assert scored(world, other, form)[0].mean() < 0.62, "changing nothing would reach 0.5"


def test_a_swap_is_the_decoded_mixture_of_latents():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x, base, source = draw(6, 12), torch.tensor([0, 2, 5, 1]), torch.tensor([3, 4, 1, 0])
    pairs = Pairs(base, source, torch.tensor([True, False, True, False]))
    masks, number = torch.rand(2, 20, generator=g), torch.tensor([0, 1, 1, 0])
    for norm in (None, "layer_norm"):
        sae = SAE(draw(12, 20), draw(20), draw(20, 12), draw(12), TopK(5), input_norm=norm)
        f, m = sae.encode(x), masks[number]
        mixed = sae.decode((1 - m) * f[base] + m * f[source], x[base])
        for keep in (True, False):
            error = x[base] - sae.decode(f[base], x[base]) if keep else 0.0
            added = Swap.of(sae, x, keep_error=keep).added(pairs, masks, number)
            torch.testing.assert_close(x[base] + added, mixed + error, atol=1e-5, rtol=1e-5)
    assert pairs.wanted.tolist() == [3, 2, 1, 1]


def test_swapping_a_subspace_of_the_models_own_moves_what_a_probe_reads(world):
    values = [one.names[0] for one in world.facts if one.attribute == "A"]
    x = world.x[::2] + 0.02 * torch.randn(ENTITIES, 96, generator=torch.Generator().manual_seed(1))
    P = subspace(x, values)
    torch.testing.assert_close(P @ P, P, atol=1e-3, rtol=1e-3)
    means = torch.stack([x[[i for i, v in enumerate(values) if v == f"v{a}"]].mean(0) for a in range(VALUES)])
    torch.testing.assert_close((means - means.mean(0)) @ P, means - means.mean(0), atol=1e-3, rtol=1e-3)
    problems = Known.of(world.facts).problems(80, 0, "correct", world.first)
    _, test = problems["thing", "A"]
    added = (world.x[test.source] - world.x[test.base]) @ P
    cause, isolation = shares(world, test, added, [one.names for one in world.facts], "correct")
    assert cause > 0.9 and isolation > 0.9


def test_pairs_are_of_other_values_and_no_entity_is_on_both_sides(world):
    known = Known.of(world.facts)
    assert known.attributes == {"thing": ("A", "B")}
    for seed in (0, 1):
        for (_, attribute), (train, test) in known.problems(80, seed, "correct", world.first).items():
            sides = [{world.facts[i].entity for i in (*p.base.tolist(), *p.source.tolist())} for p in (train, test)]
            assert not sides[0] & sides[1] and len(train) == 112 and len(test) == 48
            for part in (train, test):
                assert int(part.cause.sum()) == len(part) // 2
                for base, source, cause in zip(part.base, part.source, part.cause, strict=True):
                    one, other = world.facts[base], world.facts[source]
                    assert one.attribute == other.attribute and one.names != other.names
                    assert (one.attribute == attribute) == bool(cause)
    alike = torch.zeros_like(world.first)
    train, test = known.problems(80, 0, "compatible", alike)["thing", "A"]
    assert not train.cause.any() and not test.cause.any(), "SAEBench: completions that begin alike are isolation"
    assert len(train) == 112
    few = Known.of(world.facts[:20])
    assert few.attributes == {}


def test_the_models_answers_are_those_of_an_edit_at_the_entity(tiny_lm):
    lm, g = tiny_lm("llama"), torch.Generator().manual_seed(2)
    rows = [Row(torch.randint(3, 97, (n,), generator=g).tolist(), [4] * n, i) for i, n in enumerate((5, 9, 7))]
    world = Prompted(lm, SITE, rows, [2, 5, 6], 3, 20)
    prompts, added = torch.tensor([1, 0, 2]), 3 * torch.randn(3, 32, generator=g)
    logits, said = world.logits(prompts, added), world.new_ids(prompts, added)
    for i, number in enumerate(prompts.tolist()):
        place, row = world.places[number], list(rows[number].ids)

        def put(x, at, place=place, i=i):
            return torch.cat([x[:, :place], x[:, place : place + 1] + added[i], x[:, place + 1 :]], 1)

        for step in range(3):
            with lm.taps(edit={SITE: put}):
                last = lm(torch.tensor([row]))[0, -1]
            if not step:
                torch.testing.assert_close(logits[i], last, atol=1e-4, rtol=1e-4)
            if said[i, step] in lm.end_ids:
                break
            assert int(last.argmax()) == int(said[i, step])
            row.append(int(said[i, step]))


def test_a_models_own_completions_make_a_whole_run(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    sentences = {"A": ("xy {} a", "of {} b"), "B": ("we {} c", "to {} d")}
    asked = [(name, f"{chr(97 + i % 26)}{i}", one) for name, of in sentences.items() for i in range(48) for one in of]
    rows = [Row(*row, i) for i, row in enumerate(encode_texts(lm.tokenizer, [s.format(e) for _, e, s in asked]))]
    said = Prompted(lm, SITE, rows, [3] * len(rows), 2, 400).completions(torch.arange(len(rows)), None)
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(
        json.dumps({"entity_class": "k", "attribute": a, "entity": e, "sentence": s, "value": text.strip()})
        for (a, e, s), text in zip(asked, said, strict=True) if text.strip()))  # fmt: skip
    g = torch.Generator().manual_seed(0)
    sae = SAE(*(torch.randn(s, generator=g) for s in ((32, 48), (48,), (48, 32), (32,))), TopK(4), read=SITE)
    spec = SaebenchSpec(saes=("x",), seeds=2, batch_tokens=400,
                        ravel=RavelSpec(facts=path, classes=("k",), pairs=40, epochs=1, new_tokens=2))  # fmt: skip
    bench = Bench(lm, lm.name, SITE, (sae,), TokenPolicy(), spec, Pieces(None), tmp_path)
    prepared = ravel.TASK.prepare(bench)
    scored = prepared.score(sae, Pieces(None))
    assert {"disentanglement_score", "cause_score", "isolation_score", "llm_disentanglement_score"} <= set(scored.value)
    assert 0 <= scored.value["disentanglement_score"] <= 1 and len(scored.details) == 2
    assert "reaches a disentanglement of 0.5" in " ".join(prepared.about.notes)
    path.write_text("\n".join(path.read_text().splitlines()[:4]))
    with pytest.raises(UnweaveError, match="of 4 sentences rightly, too few"):
        ravel.TASK.prepare(bench)


def test_facts_and_what_counts_as_saying_them(tmp_path):
    own = facts(None)
    assert len({one.text for one in own}) == len(own) > 900
    assert any(one.text == "The city of Paris is in the country of" and one.names == ("France",) for one in own)
    assert all(one.text.startswith(one.start) and one.start.endswith(one.entity) for one in own)
    moscow = {one.attribute: one.names[0] for one in own if one.entity == "Moscow"}
    assert moscow == {"Country": "Russia", "Language": "Russian"}, "it is on two continents"
    states = ("United States", "USA")
    assert says(" the United States of", states, "correct") and says("USA.", states, "correct")
    assert not says(" United", states, "correct") and says(" United", states, "compatible")
    assert not says(" Frances", ("France",), "correct") and says(' Fra" Paris', ("France",), "compatible")
    path = tmp_path / "x.jsonl"
    row = {"entity_class": "k", "attribute": "a", "entity": "e", "value": ["v", "w"], "sentence": "of {} is"}
    path.write_text(json.dumps(row))
    assert facts(path) == [Fact("k", "a", "e", ("v", "w"), "of {} is")]
    wrongs = (({"value": 3}, "no fact"), ({"sentence": "{} is"}, "needs words"), ({"sentence": "it"}, "needs words"))
    for wrong, what in wrongs:
        path.write_text(json.dumps(row | wrong))
        with pytest.raises(UnweaveError, match=what):
            facts(path)
