"""Discovering behaviours: which tokens are taken, vectors of contexts, clusters, and the job that joins them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from unweave.attribute.attribution import node_effects
from unweave.circuits.graph import Circuit
from unweave.core.errors import UnweaveError
from unweave.core.result import as_read, as_written
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.data.pack import Row
from unweave.data.tokens import TokenStore
from unweave.inputs.subject import Subject
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens
from unweave.methods.behaviours import behaviours as algorithm
from unweave.methods.behaviours import cluster, contexts, view
from unweave.methods.behaviours import stage as job
from unweave.methods.behaviours.contexts import repeated
from unweave.methods.behaviours.result import (
    Behaviour,
    BehavioursResult,
    Cluster,
    Context,
    Contexts,
    Counts,
    Example,
    StrongLatent,
    VectorsResult,
)
from unweave.methods.behaviours.spec import BehaviourOptions, CircuitBehavioursSpec, ContextOptions, VectorOptions
from unweave.methods.behaviours.vectors import (
    blocks,
    from_tensors,
    parameters,
    projected_gradients,
    projection_block,
    to_tensors,
    vectors,
)
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE
from unweave.tasks.answers import AnswerLoss

LMs = Callable[..., LM]
SITES = ("embed", "attn_add.1", "mlp_add.1", "resid_post.1")

# Few steps, for speed: their sums need not agree with what is measured.
pytestmark = pytest.mark.filterwarnings("ignore:effects at .* add up to:unweave.core.errors.UnweaveWarning")


def make_sae(site: str, lm: LM, seed: int = 0, d_sae: int = 24) -> SAE:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    width = lm.d_model
    place = lm.site(site)
    return SAE(draw(width, d_sae), draw(d_sae), draw(d_sae, width), draw(width), ReLU(), read=place, write=place)


def make_store(folder: Path, rows: list[list[int]], roles: list[list[int]] | None = None) -> TokenStore:
    roles = roles or [[Role.TEXT.value] * len(row) for row in rows]
    made = [Row(ids, r, number) for number, (ids, r) in enumerate(zip(rows, roles, strict=True))]
    return TokenStore.write(folder, made, sum(map(len, rows)), {})


def random_rows(lengths: list[int], seed: int = 0, low: int = 4, high: int = 97) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, n).tolist() for n in lengths]


# -- which tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "rule", "expected"),
    [
        ([1, 2, 3, 1, 2], "bigram", [4]),  # 1 2 came before: induction
        ([1, 2, 3, 1, 4], "bigram", []),  # 1 was followed by something else
        ([1, 2, 3, 4, 2], "bigram", []),  # 2 came before, but not after 4
        ([1, 2, 3, 4, 2], "answer", [4]),
        ([5, 5, 5, 5], "bigram", [2, 3]),  # the first pair is new
        ([5, 5], "answer", [1]),
        ([1, 2, 1, 2, 1, 2], "bigram", [3, 4, 5]),
        ([7], "bigram", []),
        ([1, 2, 3, 11, 12], "bigram", []),
        ([1, 2, 3, 11, 12], "word", [4]),  # 11 and 12 read as 1 and 2 do
        ([1, 2, 3, 1, 2], "word", [4]),
    ],
)
def test_repetitions_by_hand(ids: list[int], rule: Any, expected: list[int]) -> None:
    found = repeated(ids, rule, key=lambda token: token % 10)
    assert np.flatnonzero(found).tolist() == expected


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_losses_are_those_of_the_whole_logits(
    name: str, tiny_lm: LMs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 caps its logits after the unembedding; a few positions at a time must give what all at once do."""
    lm = tiny_lm(name)
    monkeypatch.setattr(contexts, "_LOGIT_ELEMENTS", 5 * lm.vocab_size)
    rows = random_rows([13, 9])
    tokens = Tokens.pad([(row, [Role.TEXT.value] * len(row)) for row in rows], lm.pad_id)
    found = contexts.next_token_losses(lm, tokens)
    for row, losses in zip(rows, found, strict=True):
        logits = lm(torch.tensor([row]))
        assert logits is not None
        wanted = -logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(losses[: len(row) - 1], wanted, atol=1e-5, rtol=1e-5)
        assert not losses[len(row) - 1 :].any()


def brute_force(lm: LM, rows: list[list[int]], size: int, least: int, max_loss: float) -> set[tuple[int, ...]]:
    """Every token of every window, one forward pass each."""
    found = set()
    for row in rows:
        for start in range(0, len(row), size + 1):
            window = row[start : start + size + 1]
            for at in range(least, len(window)):
                logits = lm(torch.tensor([window[:at]]), keep_logits=1)
                assert logits is not None
                loss = float(-logits[0, -1].log_softmax(-1)[window[at]])
                pairs = list(itertools.pairwise(window[:at]))
                if loss < max_loss and (window[at - 1], window[at]) not in pairs and window[at] not in lm.special_ids:
                    found.add((*window[:at], window[at]))
    return found


def test_sure_tokens_are_those_of_brute_force(tiny_lm: LMs, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    with torch.no_grad():  # a model with an opinion
        lm.model.lm_head.weight.mul_(6)
    rows = random_rows([40, 23, 11, 7], high=16)
    # The greedy next token here and there, so that there is something to be sure of.
    for row in rows:
        for at in range(4, len(row), 2):
            start = at - at % 11
            logits = lm(torch.tensor([row[start:at] or row[:1]]), keep_logits=1)
            assert logits is not None
            row[at] = int(logits[0, -1].argmax())
    options = ContextOptions(max_loss=0.6, context=10, min_context=2, per_document=1000)
    found = contexts.find(lm, make_store(tmp_path / "store", rows), options)
    wanted = brute_force(lm, rows, 10, 2, 0.6)
    assert {(*e.ids, e.answer) for e in found.examples} == wanted and len(wanted) >= 10
    flat = [token for row in rows for token in row]
    for example in found.examples:
        assert flat[example.place] == example.answer and flat[example.place - 1] == example.ids[-1]
        assert 2 <= len(example.ids) <= 10 and example.loss < 0.6
    assert (
        found.counts.kept
        == len(found.examples)
        == sum(getattr(found.counts, name) * sign for name, sign in (("sure", 1), ("repeated", -1), ("same", -1)))
    )


def sure_of_everything(lm: LM, tokens: Tokens) -> torch.Tensor:
    return torch.full((len(tokens), tokens.ids.shape[1] - 1), 0.01)


def test_options_choose_among_sure_tokens(tiny_lm: LMs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    monkeypatch.setattr(contexts, "next_token_losses", sure_of_everything)
    rows = random_rows([30, 30, 30], high=90)
    roles = [[Role.TEXT.value] * 30 for _ in rows]
    rows[0][12], roles[1][12] = 1, Role.SPECIAL.value  # a special token, and one of the template
    store = make_store(tmp_path / "store", rows, roles)
    every = ContextOptions(context=29, min_context=5, per_document=1000, repeats="answer")
    whole = contexts.find(lm, store, every)
    assert whole.counts.scanned == 3 * 25 - 2
    assert not {12, 42} & {e.place for e in whole.examples}
    assert all(e.answer not in e.ids for e in whole.examples)
    some = contexts.find(lm, store, dataclasses.replace(every, per_document=4))
    documents = [e.document for e in some.examples]
    assert sorted(set(documents)) == [0, 1, 2] and all(documents.count(d) == 4 for d in set(documents))
    assert some.counts.crowded == len(whole.examples) - 12
    few = contexts.find(lm, store, dataclasses.replace(every, limit=7))
    assert len(few.examples) == 7 and few.counts.surplus == len(whole.examples) - 7
    again = contexts.find(lm, store, dataclasses.replace(every, limit=7))
    other = contexts.find(lm, store, dataclasses.replace(every, limit=7), seed=1)
    assert again == few and other.examples != few.examples
    assert {e.place for e in few.examples} <= {e.place for e in whole.examples}
    assert as_read(Contexts, json.loads(json.dumps(as_written(few))), "here") == few


def test_the_same_context_counts_once(tiny_lm: LMs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "next_token_losses", sure_of_everything)
    row = list(range(10, 22))
    store = make_store(tmp_path / "store", [row, [*row[:9], 80, 81, 82]])
    found = contexts.find(tiny_lm(), store, ContextOptions(context=20, min_context=6, per_document=1000))
    assert found.counts.same == 3  # tokens 6, 7 and 8 of both; what follows differs
    assert [e.place for e in found.examples] == [6, 7, 8, 9, 10, 11, 21, 22, 23]


def test_every_window_begins_with_the_rows_bos(
    make_tokenizer: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 6: a model that is used to BOS must not see contexts without it."""
    lm = LM(tiny("llama"), make_tokenizer(add_bos=True))
    monkeypatch.setattr(contexts, "next_token_losses", sure_of_everything)
    rows = [[0, *random_rows([30], low=5)[0]]]
    options = ContextOptions(context=9, min_context=3, per_document=1000)
    found = contexts.find(lm, make_store(tmp_path / "store", rows), options).examples
    assert all(e.ids[0] == 0 and 0 not in e.ids[1:] and len(e.ids) <= 9 for e in found)
    assert any(e.place > 20 for e in found) and all(rows[0][e.place] == e.answer for e in found)


def test_no_sure_token_is_an_error_that_says_what_there_was(tiny_lm: LMs, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", random_rows([20]))
    with pytest.raises(UnweaveError, match=r"sure of none of 12 tokens .*below 0\.0001 nats"):
        contexts.find(tiny_lm(), store, ContextOptions(max_loss=1e-4))
    with pytest.raises(UnweaveError, match=r"max_loss must be above 0 and below 0\.69; 0\.8 was given"):
        ContextOptions(max_loss=0.8)
    with pytest.raises(UnweaveError, match="the fields of Counts"):
        as_read(Contexts, {"result": "Contexts", "schema": 1, "value": {"counts": {}, "examples": []}}, "here")


# -- gradients --------------------------------------------------------------------------------------------------------


def whole_projection(lm: LM, seed: int, dimensions: int, density: float) -> np.ndarray:
    parts = []
    for number, parameter in enumerate(parameters(lm)):
        for block, rows in enumerate(blocks(parameter, dimensions, density)):
            n = (rows.stop - rows.start) * parameter.columns
            parts.append(projection_block(seed, number, block, n, dimensions, density).toarray())
    return np.concatenate(parts)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3", "phi3"])
def test_projected_gradients_are_autograds_times_the_matrix(
    name: str, tiny_lm: LMs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts of different lengths in one batch, biases, GPT-2's transposed layers, and several blocks a parameter."""
    monkeypatch.setattr("unweave.methods.behaviours.vectors._BLOCK_ENTRIES", 3000)
    lm = tiny_lm(name)
    rows, answers = random_rows([9, 6]), torch.tensor([40, 7])
    tokens = Tokens.pad([(row, [Role.TEXT.value] * len(row)) for row in rows], lm.pad_id)
    found = projected_gradients(lm, tokens, AnswerLoss(answers), dimensions=40, density=0.2, seed=3)
    chosen = parameters(lm)
    named = dict(lm.model.named_parameters())
    left_out = set(named) - {parameter.name for parameter in chosen}
    assert left_out and all(
        any(word in path for word in ("norm", "ln_", "embed", "wte", "wpe", "lm_head")) for path in left_out
    )
    matrix = whole_projection(lm, 3, 40, 0.2)
    for parameter in named.values():
        parameter.requires_grad_(True)
    try:
        for row, answer, mine in zip(rows, answers.tolist(), found, strict=True):
            logits = lm.model(input_ids=torch.tensor([row])).logits[0, -1]
            gradients = torch.autograd.grad(-logits.log_softmax(-1)[answer], [named[p.name] for p in chosen])
            whole = torch.cat([gradient.flatten() for gradient in gradients]).numpy()
            np.testing.assert_allclose(mine, whole @ matrix, rtol=1e-4, atol=1e-5 * np.abs(whole @ matrix).max())
    finally:
        lm.model.requires_grad_(False)


def test_the_projection_is_what_it_says() -> None:
    n, dimensions, density = 2000, 300, 0.02
    block = projection_block(5, 1, 2, n, dimensions, density)
    assert set(np.unique(block.data)) == {-1.0, 1.0} and block.has_canonical_format
    expected, spread = n * dimensions * density, math.sqrt(n * dimensions * density * (1 - density))
    assert abs(block.nnz - expected) < 5 * spread
    assert abs(block.data.sum()) < 5 * math.sqrt(expected)
    per_column = np.diff(sp.csc_array(block).indptr)
    assert abs(per_column.mean() - n * density) < 1 and abs(per_column.var() / (n * density * (1 - density)) - 1) < 0.5
    assert (block != projection_block(5, 1, 2, n, dimensions, density)).nnz == 0
    for other in ((6, 1, 2), (5, 2, 2), (5, 1, 3)):
        assert (block != projection_block(*other, n, dimensions, density)).nnz > 0
    assert projection_block(0, 0, 0, 7, 5, 1.0).nnz == 35
    with pytest.raises(UnweaveError, match="no projection"):
        projection_block(0, 0, 0, 7, 5, 1.5)


def test_projection_keeps_inner_products_in_expectation() -> None:
    """E[(a R) . (b R)] = dimensions x density x (a . b), with a standard error over columns."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal(400)
    b = 0.5 * a + rng.standard_normal(400)
    dimensions, density = 6000, 0.05
    block = projection_block(0, 0, 0, 400, dimensions, density)
    products = (a @ block) * (b @ block) / density
    error = products.std() / math.sqrt(dimensions)
    assert abs(products.mean() - a @ b) < 4 * error and error < 0.1 * abs(a @ b)


# -- vectors ----------------------------------------------------------------------------------------------------------


def some_examples(n: int = 6, seed: int = 0) -> list[Example]:
    lengths = [5 + 3 * (i % 3) for i in range(n)]
    return [
        Example(tuple(row[:-1]), row[-1], 0.1, i, 100 + i)
        for i, row in enumerate(random_rows([k + 1 for k in lengths], seed))
    ]


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_effects_of_latents_are_attribution_with_ablation(name: str, tiny_lm: LMs) -> None:
    """Sums, last and last five positions against ``node_effects`` of each example on its own, whatever the batches."""
    lm = tiny_lm(name)
    saes = {lm.site(site): make_sae(site, lm, seed) for seed, site in enumerate(SITES)}
    examples = some_examples()
    made = {
        positions: vectors(lm, saes, examples, VectorOptions(positions=positions), max_tokens=17)
        for positions in ("sum", "last", "last-5")
    }
    assert all(isinstance(found, sp.csr_array) for found in made.values())
    for i, example in enumerate(examples):
        metric = AnswerLoss(torch.tensor([example.answer]))
        effects = node_effects(lm, saes, Tokens.of(torch.tensor([example.ids])), None, metric)
        kept = [effect.latents[0] for effect in effects.values()]
        wanted = {
            "sum": torch.cat([latents[1:].sum(0) for latents in kept]),
            "last": torch.cat([latents[-1] for latents in kept]),
            "last-5": torch.cat([latents[-5:].flip(0).flatten() for latents in kept]),
        }
        for positions, found in made.items():
            row = torch.from_numpy(found[[i]].toarray()[0])
            torch.testing.assert_close(row, wanted[positions], atol=1e-5, rtol=1e-4)


def test_dense_vectors_and_latents_by_hand(tiny_lm: LMs) -> None:
    lm = tiny_lm("llama")
    sae = make_sae("resid_post.1", lm)
    (site,) = saes = {lm.site("resid_post.1"): sae}
    examples = some_examples()
    places: tuple[Any, ...] = ("sum", "last")
    dense = {p: vectors(lm, saes, examples, VectorOptions(kind="activations", positions=p)) for p in places}
    sparse = vectors(lm, saes, examples, VectorOptions(kind="latents", positions="last"))
    gradient = vectors(lm, saes, examples, VectorOptions(kind="effects-dense", positions="last"))
    whole = vectors(lm, saes, examples, VectorOptions(kind="activations"), skip_first=0)
    for i, example in enumerate(examples):
        with lm.taps(read=[site]) as seen:
            lm(torch.tensor([example.ids]))
        x = seen[site][0]
        np.testing.assert_allclose(dense["sum"][i], x[1:].sum(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(whole[i], x.sum(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dense["last"][i], x[-1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(sparse[[i]].toarray()[0], sae.encode(x[-1]), rtol=1e-4, atol=1e-5)

        def loss(scale: float, example: Example = example) -> float:
            def scaled(v: torch.Tensor, _at: Any) -> torch.Tensor:
                last = torch.zeros_like(v)
                last[:, -1] = scale
                return v * (1 + last)

            with lm.taps(edit={site: scaled}):
                logits = lm(torch.tensor([example.ids]), keep_logits=1)
            assert logits is not None
            return float(-logits[0, -1].double().log_softmax(-1)[example.answer])

        slope = (loss(1e-3) - loss(-1e-3)) / 2e-3  # all coordinates scaled together: minus the sum of their effects
        assert -gradient[i].sum() == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_vectors_refuse_what_they_cannot_do(tiny_lm: LMs) -> None:
    lm = tiny_lm()
    sae = make_sae("resid_post.1", lm)
    with pytest.raises(UnweaveError, match="no contexts"):
        vectors(lm, sae, [])
    with pytest.raises(UnweaveError, match="'words' is not one of"):
        VectorOptions.from_dict({"kind": "words"})
    with torch.no_grad():
        lm.model.get_submodule("model.layers.0.mlp.down_proj").weight[0] = math.nan
    with pytest.raises(UnweaveError, match="NaN"):
        vectors(lm, {}, some_examples(), VectorOptions(kind="gradients", dimensions=10, density=0.5))


# -- clusters ---------------------------------------------------------------------------------------------------------


def test_angular_similarity_by_hand() -> None:
    rows = np.array([[1.0, 0], [5, 0], [0, 2], [-1, 0], [1, 1], [0, 0]])
    expected = np.array(
        [
            [1, 1, 0.5, 0, 0.75, 0.5],
            [1, 1, 0.5, 0, 0.75, 0.5],
            [0.5, 0.5, 1, 0.5, 0.75, 0.5],
            [0, 0, 0.5, 1, 0.25, 0.5],
            [0.75, 0.75, 0.75, 0.25, 1, 0.5],
            [0.5, 0.5, 0.5, 0.5, 0.5, 1],
        ]
    )
    for given in (rows, sp.csr_array(rows)):
        np.testing.assert_allclose(cluster.angular_similarity(given), expected, atol=1e-7)


def planted(sizes: tuple[int, ...], noise: float = 0.25, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.standard_normal((len(sizes), 20)) * 3
    rows = centres[truth] + noise * rng.standard_normal((len(truth), 20)) * 3
    rows *= rng.uniform(0.1, 30, (len(truth), 1))  # lengths say nothing
    mixed = rng.permutation(len(truth))
    return rows[mixed], truth[mixed]


@pytest.mark.parametrize("method", ["spectral", "kmeans"])
@pytest.mark.parametrize("form", [np.asarray, sp.csr_array])
def test_planted_clusters_are_found(method: Any, form: Any) -> None:
    from sklearn.metrics import adjusted_rand_score

    rows, truth = planted((30, 20, 12, 9))
    rows[5] = 0
    found = cluster.cluster(form(rows), 4, method=method)
    assert found.labels[5] == -1 and found.sizes.sum() == len(rows) - 1
    kept = found.labels >= 0
    assert adjusted_rand_score(truth[kept], found.labels[kept]) > 0.95
    assert found.stability is not None and found.stability > 0.95
    assert (found.coherence > found.control + 3 * found.spread).all()
    by_size = cluster.cluster(form(rows), 4, method=method, rank="size")
    assert by_size.sizes.tolist() == sorted(found.sizes.tolist(), reverse=True)
    for place in range(4):
        members = found.members(place)
        assert len(members) == found.sizes[place]
        units = rows[members] / np.linalg.norm(rows[members], axis=1, keepdims=True)
        mean = units.mean(0) / np.linalg.norm(units.mean(0))
        assert found.coherence[place] == pytest.approx(float((units @ mean).mean()))
        order = cluster.typical(form(rows), members)
        cosines = dict(zip(members.tolist(), units @ mean, strict=True))
        assert [cosines[i] for i in order.tolist()] == sorted(cosines.values(), reverse=True)
    excess = found.coherence - found.control
    assert excess.tolist() == sorted(excess.tolist(), reverse=True)


def test_noise_is_no_more_coherent_than_chance_clusters_of_it() -> None:
    """Small clusters are coherent by themselves; the control shows how much."""
    rows = np.random.default_rng(0).standard_normal((60, 30))
    control = cluster.cluster(rows, 5, method="kmeans").control
    sizes = cluster.cluster(rows, 5, method="kmeans").sizes
    assert (control > 0.8 / np.sqrt(sizes)).all() and (control < 1.3 / np.sqrt(sizes) + 0.05).all()


def test_what_cannot_be_clustered_is_refused() -> None:
    rows, _ = planted((5, 5))
    rows[0] = 0
    with pytest.raises(UnweaveError, match=r"10 clusters of 9 contexts .* \(1 have a vector of zeros\)"):
        cluster.cluster(rows, 10)
    rows[1, 0] = np.nan
    with pytest.raises(UnweaveError, match="NaN"):
        cluster.cluster(rows, 2)
    assert len(cluster.cluster(rows[2:], 1)) == 1 and len(cluster.cluster(rows[2:], 8)) == 8


# -- the job ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny: Any, make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that is sure of itself, its SAEs, and a text of 40 documents that it half knows."""
    tmp_path = tmp_path_factory.mktemp("behaviours")
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    tokenizer = make_tokenizer(chat_template=None)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lm = LM(model, tokenizer)
    for seed, site in enumerate(("resid_post.0", "mlp_add.1", "resid_post.1")):
        make_sae(site, lm, seed).save(tmp_path / "saes" / site)
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(40):
        ids = rng.integers(5, 97, 4).tolist()
        while len(ids) < 30:
            logits = lm(torch.tensor([ids]), keep_logits=1)
            assert logits is not None
            ids.append(int(logits[0, -1, 5:-1].argmax()) + 5 if len(ids) % 4 else int(rng.integers(5, 96)))
        documents.append(lm.decode(ids))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return tmp_path


def asked(folder: Path, **fields: Any) -> CircuitBehavioursSpec:
    """The usual question; fields by dotted name."""
    values: dict[str, Any] = {
        "saes": [str(folder / "saes")],
        "model": str(folder / "model"),
        "data": {"sources": [{"path": str(folder / "text.jsonl")}], "pack": {"context": 64}},
        "tokens": 800,
        "contexts": {"max_loss": 0.6, "context": 16, "min_context": 4},
        "clusters": {"number": 4, "min_size": 3},
        "circuit": {"examples": 4, "steps": 2, "node_threshold": 0.01, "edge_threshold": 0.001},
        "behaviours": 3,
        "records_tokens": 0,
        "accept_mismatch": "a test",
    }
    for name, value in fields.items():
        group, _, inner = name.partition("__")
        values[group] = values.get(group, {}) | {inner: value} if inner else value
    return CircuitBehavioursSpec.from_dict(values)


def runs_of(kind: str, runs: Path) -> set[str]:
    return {path.name for path in runs.glob(f"circuit-{kind}-*")}


def test_from_a_text_to_circuits_and_an_index(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is made once: after a crash, and when more behaviours or another threshold is asked for."""
    runs, calls = tmp_path, list[int]()
    whole = algorithm.find_circuit

    def counted(*args: Any, **named: Any) -> Any:
        if len(calls) == 2:
            calls.append(-1)
            raise KeyboardInterrupt
        calls.append(len(calls))
        return whole(*args, **named)

    monkeypatch.setattr(algorithm, "find_circuit", counted)
    with pytest.raises(KeyboardInterrupt):
        job.run(asked(folder), runs)
    calls.append(0)
    monkeypatch.setattr(job, "find", None)  # contexts, vectors and clusters are there: none is made again
    monkeypatch.setattr(job, "vectors", None)
    grouping = cluster.cluster
    monkeypatch.setattr(cluster, "cluster", None)
    run = job.run(asked(folder), runs)
    assert calls.count(-1) == 1 and len(calls) == 5  # two before, the one that was cut short, the mark, one after
    monkeypatch.setattr(cluster, "cluster", grouping)
    result = run.result
    assert len(result.behaviours) == 3 and len(runs_of("behaviour", runs)) == 3
    assert not list(runs.glob("circuit-*/parts*")), "parts of what is finished are of no use"
    for one in result.behaviours:
        size = result.clusters[one.place].size
        assert size >= 3
        circuit = Circuit.load(runs / one.run / "circuit.safetensors")
        assert not circuit.positions and circuit.n_examples == one.examples == min(4, size) and len(circuit.nodes) == 3
        assert circuit.counts(0.01) == (one.latents, one.errors)
        assert [sums.site for sums in one.sums] == sorted(circuit.nodes)
        ids = Run.at(runs / one.run).spec["contexts"]
        few = contexts.batches(LM.load(str(folder / "model")), [Example(tuple(r[:-1]), r[-1], 0, 0, 0) for r in ids])
        assert sum(len(clean) for clean, _, _ in few) == len(ids) == one.examples
    again = job.run(asked(folder), runs)
    assert again.reused and len(calls) == 5
    more = job.run(asked(folder, behaviours=4, clusters__min_size=1), runs)
    assert len(calls) == 6 and len(more.result.behaviours) == 4
    assert {one.run for one in result.behaviours} < {one.run for one in more.result.behaviours}
    shown = job.run(asked(folder, behaviours=4, clusters__min_size=1, records_tokens=300), runs)
    assert len(calls) == 6 and 'uw-peak" title' in (shown.path / "index.html").read_text()
    job.run(asked(folder, circuit__node_threshold=0.02), runs)
    assert [len(runs_of(kind, runs)) for kind in ("contexts", "vectors")] == [1, 1]
    html = (more.path / "index.html").read_text()
    assert 'uw-peak" title' not in html
    assert html.count("<article") == 4 and html.count("<mark") >= 4 and "<svg" in html and 'class="uw-find"' in html
    assert "default-src 'none'" in html and not re.search(r'(?:src|href)="(?!#|data:)', html)


def test_the_result_is_read_back_and_a_finished_question_loads_nothing(
    folder: Path, whole: Run[BehavioursResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = whole.result
    assert as_read(BehavioursResult, json.loads(json.dumps(as_written(result))), "here") == result
    assert [row[0] for row in result.rows()][:3] == ["behaviour 1", "behaviour 2", "behaviour 3"]
    html = result._repr_html_()
    assert html.count("<article") == 3 and all(latent.name in html for latent in result.behaviours[0].strongest)
    for kind in (LM, SAE):
        monkeypatch.setattr(kind, "load", None)
    assert job.run(asked(folder), whole.path.parent).reused


def test_it_works_in_a_notebook(folder: Path, whole: Run[BehavioursResult]) -> None:
    """Texts and handles in, a result out: the stage's, but for what its runs hold."""
    lm = LM.load(str(folder / "model"))
    saes = {lm.site(place.name): SAE.load(place) for place in (folder / "saes").iterdir()}
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    spec = asked(folder)
    assert spec.data is not None
    store = job.token_store(lm, str(folder / "model"), spec.data, "train", 800, whole.path.parent)[0]
    options = BehaviourOptions.from_dict({f.name: getattr(spec, f.name) for f in dataclasses.fields(BehaviourOptions)})
    found = algorithm.behaviours(lm, saes, store, options)
    bare = [dataclasses.replace(one, run="", drawing=None) for one in whole.result.behaviours]
    assert list(found.behaviours) == bare and found.clusters == whole.result.clusters
    assert found.counts == whole.result.counts
    own = algorithm.behaviours(lm, saes, texts, options)
    assert own.counts.scanned > found.counts.scanned and len(own.behaviours) == 3
    assert "svg" not in own._repr_html_().partition("<article")[2] and own._repr_html_().count("<article") == 3


def test_texts_in_memory_are_read_as_a_store_is(folder: Path, tmp_path: Path) -> None:
    lm = LM.load(str(folder / "model"))
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    memory = contexts.Texts(lm, [*texts, ""])
    store = make_store(tmp_path / "store", [lm.tokenize(text).ids[0].tolist() for text in texts])
    options = ContextOptions(max_loss=0.6, context=16, min_context=4)
    assert contexts.find(lm, memory, options) == contexts.find(lm, store, options)


def quick(calls: list[Any]) -> Callable[..., Circuit]:
    """Stands for ``find_circuit`` and notes what it was asked."""

    def find(_lm: Any, _saes: Any, batches: Any, options: Any, *, pieces: Any) -> Circuit:
        del pieces
        metric = {batch[2].kind for batch in batches}
        calls.append((options, metric, [batch[0].ids.tolist() for batch in batches]))
        return Circuit({Site("resid_post", 1): torch.ones(1, 25)}, {}, False, 2)

    return find


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Where the usual question was asked, and what ``find_circuit`` was asked."""
    runs, calls = tmp_path_factory.mktemp("runs"), list[Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm, "find_circuit", quick(calls))
        job.run(asked(folder), runs)
        return runs, calls


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("contexts__max_loss", 0.5, "contexts"),
        ("contexts__min_context", 6, "contexts"),
        ("contexts__context", 12, "contexts"),
        ("contexts__repeats", "answer", "contexts"),
        ("contexts__per_document", 1, "contexts"),
        ("contexts__limit", 30, "contexts"),
        ("seed", 1, "contexts"),
        ("vectors__kind", "latents", "vectors"),
        ("vectors__positions", "last", "vectors"),
        ("skip_first", 2, "vectors"),
        ("clusters__number", 3, "clusters"),
        ("clusters__method", "kmeans", "clusters"),
        ("clusters__rank", "size", "clusters"),
        ("circuit__examples", 2, "circuits"),
    ],
)
def test_every_option_changes_what_is_asked_of_circuits(
    folder: Path,
    plain: tuple[Path, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: Any,
    parts: str,
) -> None:
    """Trap 31: an option that is accepted and not used."""
    runs, first = plain
    calls: list[Any] = []
    monkeypatch.setattr(algorithm, "find_circuit", quick(calls))
    before = [runs_of(kind, runs) for kind in ("contexts", "vectors")]
    job.run(asked(folder, **{field: value}), runs)
    same = [runs_of(kind, runs) == there for kind, there in zip(("contexts", "vectors"), before, strict=True)]
    assert same == {"contexts": [False, False], "vectors": [True, False]}.get(parts, [True, True])
    assert [ids for _, _, ids in calls] and [ids for _, _, ids in calls] != [ids for _, _, ids in first]


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run[BehavioursResult]:
    return job.run(asked(folder), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("split", "heldout"),
        ("clusters__min_size", None),
        ("behaviours", 1),
        ("circuit__method", "attribution"),
        ("circuit__rule", "left"),
        ("circuit__steps", 5),
        ("circuit__metric", "neg-logit"),
        ("circuit__node_threshold", 0.5),
        ("circuit__edge_threshold", 0.1),
    ],
)
def test_every_option_changes_what_is_found(folder: Path, whole: Run[BehavioursResult], field: str, value: Any) -> None:
    """Trap 31: an option that is accepted and not used."""
    more: dict[str, Any] = {"circuit__steps": 4} if value == "attribution" else {}  # it has none but the default
    before, runs, least = found_by(whole.result), whole.path.parent, 0
    if field == "split":
        more = {"data": asked(folder).to_dict()["data"] | {"heldout": 0.5}, "tokens": 400}
        before = found_by(job.run(asked(folder, **more), runs).result)
    if field == "clusters__min_size":
        value = least = 1 + min(whole.result.clusters[one.place].size for one in before)
    result = job.run(asked(folder, **more | {field: value}), runs).result
    after = found_by(result)
    assert before and after and after != before
    if field == "clusters__min_size":
        assert all(result.clusters[one.place].size >= least for one in after)
    if field == "circuit__edge_threshold":
        assert sum(one.edges for one in after) < sum(one.edges for one in before)


def found_by(result: BehavioursResult) -> list[Behaviour]:
    """What is known of each behaviour, but for where it lies."""
    return [dataclasses.replace(one, run="", drawing=None) for one in result.behaviours]


def test_parts_belong_to_their_examples(
    folder: Path, whole: Run[BehavioursResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted work may go on with other batches, whose parts have the same numbers of batches and rows."""
    find = algorithm.find_circuit

    def stopped(*args: Any, **named: Any) -> Circuit:
        find(*args, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(algorithm, "find_circuit", stopped)
    for max_tokens in (40, 20):
        with pytest.raises(KeyboardInterrupt):
            job.run(asked(folder, max_tokens=max_tokens), tmp_path)
    (part,) = tmp_path.glob("circuit-behaviour-*")
    assert len(list((part / "parts").iterdir())) > 2, "one question, whatever fits into memory"
    monkeypatch.setattr(algorithm, "find_circuit", find)
    after = job.run(asked(folder), tmp_path).result.behaviours[0]
    before = whole.result.behaviours[0]
    assert [one.name for one in after.strongest] == [one.name for one in before.strongest]
    expected = [one.effect for one in before.strongest]
    assert [one.effect for one in after.strongest] == pytest.approx(expected, rel=1e-4)


def test_a_changed_text_is_looked_through_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.jsonl"
    lines = (folder / "text.jsonl").read_text().splitlines()
    path.write_text("\n".join(lines))
    spec = asked(folder, data={"sources": [{"path": str(path)}], "pack": {"context": 64}})
    monkeypatch.setattr(algorithm, "find_circuit", quick([]))
    before = job.run(spec, tmp_path)
    assert job.run(spec, tmp_path).reused
    path.write_text("\n".join(lines[:30]))
    after = job.run(spec, tmp_path)
    assert after.path != before.path and not after.reused
    assert after.result.counts != before.result.counts and len(runs_of("contexts", tmp_path)) == 2


def test_gradients_have_options_of_their_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithm, "find_circuit", quick([]))
    few = {"vectors__kind": "gradients", "contexts__limit": 12, "clusters__number": 2}
    few |= {"vectors__density": 0.3, "vectors__dimensions": 30}
    job.run(asked(folder, **few), tmp_path)
    (name,) = runs_of("vectors", tmp_path)
    done = job.Run.at(tmp_path / name, VectorsResult)
    assert (done.result.contexts, done.result.width) == job._rows(done).shape == (12, 30)
    for number, more in enumerate(({"vectors__dimensions": 20}, {"vectors__density": 0.1}), 2):
        job.run(asked(folder, **few | more), tmp_path)
        assert [len(runs_of(kind, tmp_path)) for kind in ("contexts", "vectors")] == [1, number]
    job.run(asked(folder, **few, sites=["resid_post.1"]), tmp_path)
    assert len(runs_of("vectors", tmp_path)) == 3, "gradients are of the model alone"
    with pytest.raises(UnweaveError, match="dimensions = 20 would have no effect"):
        asked(folder, vectors__dimensions=20)
    with pytest.raises(UnweaveError, match="positions = 'last' would have no effect"):
        asked(folder, vectors__kind="gradients", vectors__positions="last")


@pytest.mark.parametrize("rows", [np.arange(6, dtype=np.float32).reshape(2, 3), sp.csr_array(np.eye(3, 5)[:2])])
def test_vectors_in_a_file_are_the_same(rows: Any) -> None:
    again = from_tensors(to_tensors(rows))
    assert type(again) is type(rows) and again.shape == rows.shape and abs(again - rows).max() == 0


def test_what_the_job_cannot_do_is_clear(folder: Path, tmp_path: Path) -> None:
    runs = tmp_path
    few = {"contexts__limit": 60, "contexts__per_document": 1, "clusters__number": 60}
    with pytest.raises(UnweaveError, match=r"60 clusters of \d+ contexts cannot be made"):
        job.run(asked(folder, **few), runs)
    with pytest.raises(UnweaveError, match=r"no cluster has 900 contexts; the largest has \d+"):
        job.run(asked(folder, clusters__min_size=900), runs)
    with pytest.raises(UnweaveError, match="sure of none of"):
        job.run(asked(folder, contexts__max_loss=1e-9), runs)
    with pytest.raises(UnweaveError, match="do not say which text"):
        job.run(dataclasses.replace(asked(folder), data=None), runs)
    for field, value in {"contexts__max_loss": 0.9, "contexts__context": 3, "skip_first": 4, "behaviours": 0}.items():
        with pytest.raises(UnweaveError, match=f"{field.rpartition('__')[2]} must be"):
            asked(folder, **{field: value})
    with pytest.raises(UnweaveError, match="1000 contexts cannot make 2000 clusters"):
        asked(folder, clusters__number=2000)


def test_the_index_escapes_what_texts_hold() -> None:
    bad = '<script>alert("1")</script>'
    latent = StrongLatent(Site("embed"), 3, -0.5, ((bad, 1.0),))
    one = Behaviour(
        0, 8, ((bad, 3),), (Context((bad, "\n", " x"), bad, 0.1),), 4, 1, 0, 1, (latent,), (), run=bad
    )  # fmt: skip
    result = BehavioursResult(
        Subject(bad, "", (), {}), Counts(9, 8, 1, 0, 0, 0, 7), "latents", "ig", 1, (Cluster(9, 0.5, 0.2, 0.01),), None,
        (one,),
    )  # fmt: skip
    html = view.section(result).body
    assert "<script>alert" not in html and html.count("&lt;script&gt;") >= 7 and "1 latent, 0 errors, 1 edge" in html
