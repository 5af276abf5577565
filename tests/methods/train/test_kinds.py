"""Kinds of SAE: terms and gradients against dense references, presets, schedules, resampling, going on, folding."""

from __future__ import annotations

import ast
import dataclasses
import io
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from helpers.watch import largest_output
from unweave.cli.fields import leaves
from unweave.core.dist import Group
from unweave.core.errors import UnweaveError
from unweave.methods.train import entries as selection
from unweave.methods.train import init, objectives, resample
from unweave.methods.train.entries import Entries
from unweave.methods.train.init import Affine
from unweave.methods.train.kinds import JumpReLUSpec, MatryoshkaSpec, PAnnealSpec, SAESpec, TopKSpec
from unweave.methods.train.presets import PRESETS
from unweave.methods.train.spec import TrainSpec
from unweave.methods.train.trainer import SAETrainer
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.sae.module import SAE
from unweave.sae.sparse import kernels, products
from unweave.sae.sparse.pattern import Choice

D, K = 12, 4
KINDS = tuple(SAESpec.members)
BOUNDED = ("relu", "p-anneal", "gated", "jumprelu")


def _data(n: int = 400, seed: int = 0, d: int = D) -> Tensor:
    """Sparse combinations of 40 directions around a mean that is not zero, float64."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, d, generator=g)
    strength = torch.rand(n, 40, generator=g) * (torch.rand(n, 40, generator=g) < 0.1)
    return (strength @ directions + torch.randn(d, generator=g) + 0.01 * torch.randn(n, d, generator=g)).double()


def _spec(kind: str, **options: Any) -> SAESpec:
    values: dict[str, Any] = {"kind": kind, "batch": 50, "tokens": 20_000, "warmup": 0.0, "decay": 0.0, "expansion": 8}
    if options.get("sparsity") is None or options.get("penalty") == "target":
        values["k"] = K
    if kind == "jumprelu":
        values["bandwidth"] = 0.3
    if kind == "matryoshka":
        values["groups"] = [0.25, 0.25, 0.5]
    return SAESpec.from_dict(values | options)


def _trainer(kind: str, x: Tensor | None = None, **options: Any) -> SAETrainer:
    x = _data() if x is None else x
    return SAETrainer(_spec(kind, **options), x.shape[1], init_x=x, dtype=torch.float64)


def _unsettle(t: SAETrainer, seed: int = 0) -> None:
    """Everything away from its first values (trap 21: tests that pass because a bias is zero)."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"b_enc": 0.05, "b_dec": 0.1, "r_mag": 0.2, "b_mag": 0.05, "W_skip": 0.1, "W_enc": 0.02}
    for name, p in t.weights.named().items():
        p.data.add_(sizes.get(name, 0.0) * torch.randn(p.shape, generator=g))
    level = 0.02 + 0.2 * torch.rand(t.d_sae, generator=g).double()
    for name, p in t.weights.own.items():
        if name in ("plain_threshold", "log_threshold"):
            p.data.copy_(level if name == "plain_threshold" else level.log())


def test_nothing_outside_its_file_asks_of_which_kind_a_spec_is() -> None:
    folder = Path(selection.__file__).parent
    asked = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            parts += [node.subject] if isinstance(node, ast.Match) else []
            names = [part.attr for part in parts if isinstance(part, ast.Attribute)]
            words = [part.value for part in parts if isinstance(part, ast.Constant)]
            asked += [f"{path.name}:{node.lineno}" for name in [*names, *words] if name == "kind" or name in KINDS]
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                asked += [f"{path.name}:{node.lineno}"] * ast.unparse(node.args[1]).endswith("Spec")
    assert asked == []
    assert {path.stem.replace("_", "-") for path in (folder / "kinds").glob("*.py")} == {"--init--", "base", *KINDS}


# -- terms and gradients ---------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "multi-topk": ("topk", {"multi_topk": 0.125}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka", {}),
    "relu": ("relu", {}),
    "relu-fixed": ("relu", {"sparsity": 0.3, "sparsity_warmup": 0.5}),
    "p-anneal": ("p-anneal", {"sparsity": 0.3}),
    "gated": ("gated", {"sparsity": 0.2}),
    "jumprelu-target": ("jumprelu", {}),
    "jumprelu-step": ("jumprelu", {"penalty": "step", "sparsity": 0.05}),
    "jumprelu-tanh": ("jumprelu", {"penalty": "tanh", "sparsity": 0.05, "tanh_scale": 3.0}),
    "jumprelu-log": ("jumprelu", {"threshold_parameter": "log"}),
    "jumprelu-silent": ("jumprelu", {"preact_weight": 0.02}),
    "jumprelu-silent-all": ("jumprelu", {"preact_weight": 0.02, "preact_on": "all"}),
}
FORMS = {True: ("sparse", "dense", "chunks"), False: ("sparse",)}
EVERY = [(name, form) for name, (kind, _) in CASES.items() for form in FORMS[kind in BOUNDED]]


def _reference(t: SAETrainer, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, dense, from its definition, and its gradients to every parameter and to x."""
    p = {name: v.detach().clone().requires_grad_() for name, v in t.weights.named().items()}
    start = _data()
    centre = start.mean(0)
    x = x.detach().clone().requires_grad_()
    seen = (x - centre) / (start - centre).square().sum(1).mean().sqrt()
    z, rows, spec, n = seen @ p["W_enc"].T + p["b_enc"], p["W_dec"], t.spec, len(x)
    loss = torch.zeros((), dtype=torch.float64)
    fixed, rise = getattr(spec, "sparsity", None), getattr(spec, "sparsity_warmup", 0.0)
    coefficient = t.state.coefficient if fixed is None else fixed
    if rise:
        coefficient *= (t.tokens_seen + spec.batch) / (rise * spec.tokens)

    def error(f: Tensor) -> Tensor:
        return ((f @ rows + p["b_dec"] - seen) ** 2).sum() / n

    if spec.kind in ("relu", "p-anneal"):
        f = torch.relu(z)
        power = 1.0 if spec.kind == "relu" else 1 - (1 - spec.p_end) * t.state.stage / spec.anneal_updates
        small = objectives.P_SMALL if power < 1 else 0.0
        loss = loss + coefficient * (((f + small) ** power - small**power) * (f > 0)).sum() / n
    elif spec.kind == "gated":
        u = seen @ p["W_enc"].T
        f = torch.relu(p["r_mag"].exp() * u + p["b_mag"]) * (z > 0).double()
        gate = torch.relu(z)
        loss = loss + coefficient * gate.sum() / n
        loss = loss + ((gate @ rows.detach() + p["b_dec"].detach() - seen) ** 2).sum() / n
    elif spec.kind == "jumprelu":
        theta, width = p.get("plain_threshold"), spec.bandwidth
        theta = p["log_threshold"].exp() if theta is None else theta
        pull = theta - theta.detach()  # zero, with gradient 1
        near = ((z - theta).abs() < width / 2).double().detach()
        f = torch.where(z > theta, torch.relu(z), 0) - (theta / width * near).detach() * pull
        l0 = ((z > theta).double() - near / width * pull).sum() / n
        if spec.penalty == "tanh":
            loss = loss + coefficient * torch.tanh(spec.tanh_scale * f).sum() / n
        else:
            loss = loss + ((l0 / K - 1) ** 2 if spec.penalty == "target" else coefficient * l0)
        if spec.preact_weight:
            some = torch.ones(t.d_sae).double() if spec.preact_on == "all" else (t.dead_for >= spec.dead_after).double()
            loss = loss + spec.preact_weight * (torch.relu(theta - z) * some).sum() / n
    else:
        flat = z.flatten().topk(K * n).values[-1] if spec.kind != "topk" else z.topk(K, dim=1).values[:, -1:]
        f = torch.relu(z) * (z >= flat)
        if getattr(spec, "multi_topk", 0):
            loss = loss + spec.multi_topk * error(torch.relu(z) * (z >= z.topk(4 * K, dim=1).values[:, -1:]))
    if spec.kind == "matryoshka":
        ends = [24, 48, 96]
        loss = loss + sum(error(f * (torch.arange(96) < end)) for end in ends) / 3
    else:
        loss = loss + error(f)
    if spec.aux_weight:
        dead = t.dead
        za = z[:, dead]
        said = torch.relu(za) * (za >= za.topk(spec.k_aux, dim=1).values[:, -1:])
        rest = (seen - (f @ rows + p["b_dec"])).detach()
        loss = loss + spec.aux_weight * ((rest - said @ rows[dead]) ** 2).sum() / (rest**2).sum()
    loss.backward()
    grads = {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in (p | {"x": x}).items()}
    return loss.detach(), grads


@pytest.mark.parametrize(("case", "form"), EVERY)
def test_terms_and_gradients_are_those_of_a_dense_reference(
    case: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = CASES[case]
    t = _trainer(kind, aux_weight=0.5, k_aux=3, **options)
    _unsettle(t)
    t.tokens_seen, t.state.stage = 3000, 4
    t.dead_for[::3] = t.spec.dead_after
    if kind in BOUNDED and form == "sparse":
        monkeypatch.setattr(selection, "SPARSE_BELOW", 1.0)
    if form == "chunks":  # of 32 and 18 rows
        monkeypatch.setattr(kernels, "CHUNK_BYTES", 0)
    x = _data(50, seed=3).requires_grad_()
    entries = t.spec.select(t.weights, t._input(x), t.state, t.group)
    assert (entries is None) == (form in ("dense", "chunks"))
    wanted, gradients = _reference(t, x)
    attempt = t.attempt(x)
    assert float(attempt.loss.detach()) == pytest.approx(float(wanted), rel=1e-9)
    # The goal of an SAE is its input: the gradient to x has both parts.
    attempt.loss.backward()
    for name, p in (t.weights.named() | {"x": x}).items():
        assert p.grad is not None, name
        assert (p.grad - gradients[name]).norm() <= 1e-8 * gradients[name].norm() + 1e-12, name
    sae = t.to_sae()
    if kind not in ("batchtopk", "matryoshka"):  # whose threshold is not measured yet
        torch.testing.assert_close(attempt.y, sae(x.detach()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", BOUNDED)
def test_both_forms_agree_on_what_fired_and_how_much(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = _trainer(kind)
    _unsettle(t)
    x = _data(50, seed=4)
    dense = t.attempt(x)
    monkeypatch.setattr(selection, "SPARSE_BELOW", 1.0)
    sparse = t.attempt(x)
    assert torch.equal(dense.fired, sparse.fired) and int(dense.active) == int(sparse.active) > 0


def test_sparse_handling_begins_when_few_are_active_and_rests_after_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    t = _trainer("relu", lr=1e-9)
    x = t._input(_data(50))
    assert t.spec.select(t.weights, x, t.state, t.group) is None  # density is not known yet
    t.state.density = 0.01  # wrong: about half are active
    assert t.spec.select(t.weights, x, t.state, t.group) is None
    assert t.state.wait > 0
    t.state.wait = 0
    t.weights.b_enc.data -= 1.0
    t.step(_data(50))
    assert t.state.density < selection.SPARSE_BELOW
    assert t.spec.select(t.weights, x, t.state, t.group) is not None


class Quiet(Group):
    """As one of several processes sees it: the others have nothing larger, and all together have a fixed sum."""

    def max(self, t: Tensor) -> Tensor:
        return t

    def sum(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 0.6742957234382629)


class Crowded(Quiet):
    """Another found too many active entries for sparse handling."""

    def max(self, t: Tensor) -> Tensor:
        return t.fill_(1)


def test_processes_agree_on_sparse_handling() -> None:
    t = _trainer("relu")
    t.weights.b_enc.data -= 1.0
    x = t._input(_data(50))
    for group, sparse in ((Quiet(0, 2), True), (Crowded(0, 2), False)):
        state = dataclasses.replace(t.state, density=0.01)
        assert (t.spec.select(t.weights, x, state, group) is not None) == sparse
        assert (state.wait > 0) != sparse


def test_sums_over_processes_have_one_value_and_ones_own_gradient() -> None:
    """To the last bit: adding to one's own share what the others have rounds otherwise in every process."""
    for value in (0.015218347311019897, 0.3, 0.6742957234382629):
        leaf = torch.tensor(value, requires_grad=True)
        found = objectives.total(leaf, Quiet(0, 3))
        (gradient,) = torch.autograd.grad(found, leaf)
        assert found.detach().tolist() == torch.tensor(0.6742957234382629).tolist() and float(gradient) == 1


def test_what_entries_have_of_their_latents_is_summed_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU additions of the plain gradient come in any order."""
    choice = Choice(torch.tensor([3, 0, 3, 1]), torch.tensor([0, 2, 4]), 5)
    leaf, g = torch.arange(5.0).requires_grad_(), torch.tensor([1.0, 2.0, 4.0, 8.0])
    calls, sums = [], products.latent_sums
    monkeypatch.setattr(products, "latent_sums", lambda *args: calls.append(1) or sums(*args))
    found = Entries(torch.ones(4), choice).of(leaf)
    assert found.tolist() == [3, 0, 3, 1]
    (gradient,) = torch.autograd.grad(found, leaf, g)
    assert gradient.tolist() == [2, 8, 0, 5, 0] and calls


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_holds_more_than_a_chunk_of_dense_latents(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the parameters; the batch's latents would be eight times a chunk, and the first step is a dense one."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 0)
    x = _data(256)
    t = _trainer(kind, x, batch=256, expansion=32)
    held = largest_output(lambda: t.step(x))
    assert held <= max(kernels.chunk_rows(t.d_sae) * t.d_sae, t.weights.W_enc.numel())
    assert kind not in BOUNDED or t.spec.select(t.weights, x, t.spec.first_state(), t.group) is None


def test_matryoshka_with_one_group_is_batch_topk() -> None:
    plain, nested = _trainer("batchtopk"), _trainer("matryoshka", groups=[1.0])
    three = _trainer("matryoshka")
    for b in _data(500, seed=2).split(50):
        row = plain.step(b)
        assert nested.step(b) == row
        three.step(b)
    assert torch.equal(plain.weights.W_enc, nested.weights.W_enc)
    assert not torch.allclose(plain.weights.W_enc, three.weights.W_enc)
    assert MatryoshkaSpec().group_sizes(96) == [3, 6, 12, 24, 51]


def test_matryoshka_groups_without_latents_are_refused() -> None:
    with pytest.raises(UnweaveError, match=r"of 96 latents[\s\S]*\[0, 96\]: one has none"):
        _trainer("matryoshka", groups=[0.001, 0.999])


def test_matryoshka_makes_its_first_latents_reconstruct_alone() -> None:
    x = _data(3000, seed=6)
    missed = {}
    for kind in ("batchtopk", "matryoshka"):
        t = _trainer(kind, x=x, lr=5e-3)
        for i in range(250):
            t.step(x[torch.arange(i * 50, i * 50 + 50) % 3000])
        sae = t.to_sae()
        f = sae.encode(x)
        f[:, 24:] = 0
        missed[kind] = float((sae.decode(f) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert missed["matryoshka"] < 0.8 * missed["batchtopk"]


def test_trap_30_terms_have_their_values() -> None:
    f = torch.tensor([[0.5, 0.0], [2.0, 0.25]], dtype=torch.float64)
    assert float(objectives.lp(f, 1.0, 2)) == pytest.approx(2.75 / 2)
    s = objectives.P_SMALL
    wanted = sum((v + s) ** 0.5 - s**0.5 for v in (0.5, 2.0, 0.25)) / 2
    assert float(objectives.lp(f, 0.5, 2)) == pytest.approx(wanted)
    assert float(objectives.tanh(f, 2.0, 2)) == pytest.approx((math.tanh(1) + math.tanh(4) + math.tanh(0.5)) / 2)
    leaf = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    objectives.lp(leaf, 0.2, 1).backward()
    assert leaf.grad is not None and float(leaf.grad) == pytest.approx(0.2 * s**-0.8)  # finite at zero


def test_p_annealing_keeps_the_penaltys_size_when_the_power_falls() -> None:
    x = _data(2000, seed=5)
    t = _trainer("p-anneal", x=x, sparsity=0.05, lr=1e-9, tokens=5000, anneal_start=0.2, anneal_end=0.8)
    penalties, powers, stages = [], [], []
    for i in range(100):
        b = x[torch.arange(i * 50, i * 50 + 50) % 2000]
        powers.append(t.spec.power(t.state.stage))
        penalties.append(float(t.attempt(x[:500]).penalty.detach()))
        stages.append(t.state.stage)
        t.step(b)
    assert powers[0] == 1 and powers[-1] == pytest.approx(0.2)
    assert sorted(set(powers), reverse=True) == pytest.approx([1 - 0.08 * i for i in range(11)])
    assert max(penalties) < 1.1 * min(penalties)
    assert t.state.ratio != 1
    assert stages.count(0) == 21 and stages[81:] == [10] * 19  # a fall is decided at the end of a step


@pytest.mark.parametrize("case", CASES)
def test_every_kind_trains(case: str) -> None:
    """All explain the data; a steered or aimed kind comes near k."""
    kind, options = CASES[case]
    for name, milder in (("sparsity", 0.03), ("preact_weight", 1e-3)):
        options = {**options, name: milder} if name in options else options
    options = {name: value for name, value in options.items() if name != "sparsity_warmup"}
    x = _data(3000, seed=6)
    t = _trainer(kind, x=x, lr=5e-3, **options)
    rows = [t.step(x[torch.arange(i * 50, i * 50 + 50) % 3000]) for i in range(200)]
    assert rows[-1]["fvu"] < 0.5
    if "sparsity" not in options:
        start = max(rows[0]["l0"], 0.1)
        assert abs(math.log(rows[-1]["l0"] / K)) < max(0.3, 0.7 * abs(math.log(start / K)))
    torch.testing.assert_close(t.weights.W_dec.norm(dim=1), torch.ones(t.d_sae).double())


# -- resumption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["as it comes", "sparse"])
@pytest.mark.parametrize("case", CASES)
def test_trap_26_resumption_is_bit_exact(case: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = CASES[case]
    if form == "sparse":
        monkeypatch.setattr(selection, "SPARSE_BELOW", 0.6)
    options = options | {"dead_after": 100, "tokens": 1200, "schedule": "cosine", "resample_every": 200, "clip": 1.0}
    options |= {"anneal_start": 0.1, "anneal_end": 0.7} if kind == "p-anneal" else {}
    batches = _data(600, seed=1).split(50)
    whole, first = _trainer(kind, **options), _trainer(kind, **options)
    trace = [whole.step(b) for b in batches]
    begun = [first.step(b) for b in batches[:7]]
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    first.step(batches[0])  # what happens after the checkpoint does not reach into it
    stored.seek(0)
    second = _trainer(kind, x=_data(300, seed=9), **options)
    second.load_state_dict(torch.load(stored, weights_only=True))
    assert begun + [second.step(b) for b in batches[7:]] == trace
    assert str(whole.state_dict()) == str(second.state_dict())
    for name, p in whole.weights.named().items():
        assert torch.equal(p, second.weights.named()[name])


# -- frozen matrices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_matrix_stays_bit_for_bit_and_the_rest_learns(kind: str, frozen: str) -> None:
    options: dict[str, Any] = {"dead_after": 100, "init": "random"}
    if (kind, frozen) == ("gated", "encoder"):
        with pytest.raises(UnweaveError, match="a gated SAE has no frozen encoder"):
            _spec(kind, freeze=frozen)
        return
    name = {"encoder": "W_enc", "decoder": "W_dec"}[frozen]
    free, t = _trainer(kind, **options), _trainer(kind, freeze=frozen, **options)
    before = {n: p.detach().clone() for n, p in t.weights.named().items()}
    batches = _data(400, seed=2).split(50)
    free.step(batches[0])
    t.step(batches[0])
    for n, p in t.weights.named().items():  # the first step is that of free training, but for the frozen matrix
        assert torch.equal(p, before[n] if n == name else free.weights.named()[n]), n
    first = t.step(batches[0])["fvu"]
    for b in batches[1:] * 20:
        t.step(b)
    assert len(t.dead) or kind != "topk"
    assert torch.equal(t.weights.named()[name], before[name])
    still = {n for n, p in t.weights.named().items() if torch.equal(p, before[n])}
    assert still == {name}
    assert t.step(batches[0])["fvu"] < first
    sae, scale = t.to_sae(), t._input.scale / t._output.scale
    assert torch.equal(sae.W_dec if frozen == "decoder" else sae.W_enc.T, before[name] * scale)
    again = _trainer(kind, x=_data(300, seed=9), freeze=frozen, **options)
    again.load_state_dict(t.state_dict())
    assert [again.step(b) for b in batches[:3]] == [t.step(b) for b in batches[:3]]


# -- resampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["relu", "gated", "jumprelu-target", "jumprelu-log", "topk"])
def test_resampling_starts_silent_latents_anew_and_no_others(case: str) -> None:
    kind, options = CASES[case]
    t = _trainer(kind, resample_every=500, lr=1e-6, aux_weight=0.0, **options)
    _unsettle(t)
    for name, vector in t.weights.named().items():
        if name in ("b_enc", "b_mag"):
            vector.data[::4] = -5.0
    batches = _data(500, seed=2).split(50)
    for b in batches[:-1]:
        t.step(b)
    before = {n: p.detach().clone() for n, p in t.weights.named().items()}
    silent = (t.dead_for + 50 > 250) & ~t.attempt(batches[-1]).fired
    assert 20 < int(silent.sum()) < 80
    t.step(batches[-1])
    seen = init.unit_rows(t._input(batches[-1]))
    moved = t.weights.W_dec.detach()[silent]
    assert float((moved @ seen.T).amax(1).min()) == pytest.approx(1, abs=1e-9)  # an input of this batch
    size = 0.2 * float(t.weights.W_enc.detach()[~silent].norm(dim=1).mean())
    torch.testing.assert_close(t.weights.W_enc.detach()[silent], moved * size, rtol=1e-6, atol=1e-9)
    if int(silent.sum()) <= 50:  # rows of the batch
        assert len({tuple(row) for row in moved.round(decimals=6).tolist()}) == int(silent.sum())
    for name, p in t.weights.named().items():
        if name in ("b_enc", "r_mag", "b_mag"):
            assert not bool(p[silent].any()), name
        if name not in ("b_dec",):
            assert float((p.detach()[~silent] - before[name][~silent]).abs().max()) < 1e-5, name
            memory = t.optimiser.state[p]
            assert not bool(memory["exp_avg"][silent].any()) and not bool(memory["exp_avg_sq"][silent].any())
            assert bool(memory["exp_avg"][~silent].any())
    if isinstance(t.spec, JumpReLUSpec):
        assert t.spec.threshold(t.weights)[silent].tolist() == pytest.approx([t.spec.bandwidth] * int(silent.sum()))
    assert int(t.dead_for[silent].max()) == 0


def test_resampling_draws_inputs_in_proportion_to_their_squared_error() -> None:
    t = _trainer("relu", expansion=100)
    x = torch.eye(D, dtype=torch.float64)[:4]
    y = x.clone()
    y[1, 5], y[3, 5] = 1.0, 2.0  # squared errors 0, 1, 0, 4
    silent = torch.ones(t.d_sae, dtype=torch.bool)
    resample.begin_anew(t, silent, x, x, y)
    counts = (t.weights.W_dec @ x.T > 0.99).sum(0)
    assert counts[0] == counts[2] == 0 and int(counts.sum()) == t.d_sae
    assert float(counts[3] / t.d_sae) == pytest.approx(0.8, abs=0.05)


# -- where training starts -------------------------------------------------------------------------------------------


def test_trap_07_sinks_decide_neither_centre_nor_scale() -> None:
    x = _data(500)
    plain = Affine.measure(x, "mean", True)
    with_sinks = x.clone()
    with_sinks[::100] = 3000.0
    keep = torch.ones(500, dtype=torch.bool)
    keep[::100] = False
    found, wanted = Affine.measure(with_sinks, "mean", True), Affine.measure(x[keep], "mean", True)
    torch.testing.assert_close(found.centre, wanted.centre)
    assert found.scale == wanted.scale == pytest.approx(plain.scale, rel=0.05)
    # A mean far from the origin hides rows that are far from the mean: distances to it are looked at too.
    far = x + 1e4
    far[::100] += 300
    assert Affine.measure(far, "median", True).scale == pytest.approx(plain.scale, rel=0.1)


def test_independent_rows_are_kaiming_uniform_and_the_decoders_have_norm_one() -> None:
    t = _trainer("relu", init="independent", sparsity=1.0)
    w = {name: p.detach() for name, p in t.weights.named().items()}
    limit = math.sqrt(6 / t.d_sae)
    assert 0.95 * limit < float(w["W_enc"].abs().max()) <= limit
    assert float(w["W_enc"].square().mean()) == pytest.approx(limit**2 / 3, rel=0.1)
    torch.testing.assert_close(w["W_dec"].norm(dim=1), torch.ones(t.d_sae).double())
    cosine = (init.unit_rows(w["W_enc"].clone()) * w["W_dec"]).sum(1)
    assert float(cosine.abs().mean()) < 0.5


def test_the_decoders_bias_starts_where_it_is_asked_to() -> None:
    x = _data(300)
    for kind, point in (("zero", torch.zeros(D).double()), ("mean", x.mean(0)), ("median", init.geometric_median(x))):
        t = _trainer("relu", x=x, centre="none", normalise=False, bias_init=kind)
        torch.testing.assert_close(t.weights.b_dec.detach(), point)


# -- going on with a trained SAE ---------------------------------------------------------------------------------------


def _random_sae(activation: ReLU | JumpReLU | TopK, *, seed: int = 0, even: bool = False, d_out: int = D) -> SAE:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(96, d_out, generator=g).double()
    rows = init.unit_rows(rows) * (1.7 if even else 0.5 + torch.rand(96, 1, generator=g).double())
    return SAE(
        torch.randn(D, 96, generator=g).double() * 0.3,
        torch.randn(96, generator=g).double() * 0.3,
        rows,
        torch.randn(d_out, generator=g).double(),
        activation,
        W_skip=None if d_out == D else torch.randn(D, d_out, generator=g).double(),
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("relu", {}),
        ("p-anneal", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("jumprelu", {"threshold_parameter": "log"}),
        ("batchtopk", {}),
        ("matryoshka", {}),
        ("topk", {}),
    ],
)
def test_training_goes_on_from_an_sae_as_it_is(kind: str, options: dict[str, Any]) -> None:
    constant = kind in ("batchtopk", "matryoshka")
    level = torch.full((96,), 0.4) if constant else 0.1 + torch.rand(96)
    activation = TopK(K) if kind == "topk" else ReLU() if kind in ("relu", "p-anneal") else JumpReLU(level.double())
    start = _random_sae(activation, even=kind == "topk" or constant)
    x = _data(300)
    t = SAETrainer(_spec(kind, lr=1e-12, **options), D, init_x=x, dtype=torch.float64, start=start)
    for steps in range(3):
        found, norms = t.to_sae(), start.W_dec.norm(dim=1)
        torch.testing.assert_close(found.encode(x), start.encode(x) * norms, rtol=1e-5, atol=1e-5)
        if not (constant and steps):  # whose threshold follows the batches
            torch.testing.assert_close(found(x), start(x), rtol=1e-5, atol=1e-5)
        if constant:
            break
        torch.testing.assert_close(t.attempt(x).y, start(x), rtol=1e-5, atol=1e-5)
        t.step(x[:50])


def test_a_skip_transcoder_goes_on_too() -> None:
    start = _random_sae(ReLU(), d_out=7)
    x = _data(300)
    goal = start(x) + 0.1
    spec = _spec("relu", skip="zero")
    t = SAETrainer(spec, D, init_x=x, init_target=goal, dtype=torch.float64, start=start)
    torch.testing.assert_close(t.to_sae()(x), start(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(UnweaveError, match="has a skip"):
        SAETrainer(_spec("relu"), D, init_x=x, init_target=goal, start=start)


def test_an_sae_that_does_not_fit_is_refused() -> None:
    x = _data(300)

    def begin(kind: str, start: SAE, **options: Any) -> SAETrainer:
        return SAETrainer(_spec(kind, **options), D, init_x=x, start=start)

    with pytest.raises(UnweaveError, match="relu or p-anneal or gated or jumprelu"):
        begin("topk", _random_sae(ReLU()))
    with pytest.raises(UnweaveError, match="use kind topk"):
        begin("relu", _random_sae(TopK(K)))
    with pytest.raises(UnweaveError, match=r"use kind gated or jumprelu$"):
        begin("batchtopk", _random_sae(JumpReLU(torch.rand(96))))
    with pytest.raises(UnweaveError, match="has k 7, not 4"):
        begin("topk", _random_sae(TopK(7), even=True))
    with pytest.raises(UnweaveError, match="differ in norm"):
        begin("topk", _random_sae(TopK(K)))
    with pytest.raises(UnweaveError, match="12 -> 96 latents -> 12, not 12 -> 48"):
        begin("relu", _random_sae(ReLU()), expansion=4)
    normed = _random_sae(ReLU())
    normed.input_norm = "layer_norm"
    with pytest.raises(UnweaveError, match=r"token by token \(layer_norm\)"):
        begin("relu", normed)
    with pytest.raises(UnweaveError, match="use kind relu or p-anneal or gated"):
        begin("jumprelu", _random_sae(ReLU()), threshold_parameter="log")


@pytest.mark.parametrize(
    "options", [{"init": "random"}, {"bias_init": "mean"}, {"kind": "jumprelu", "threshold_init": 0.1}]
)
def test_trap_31_where_to_begin_means_nothing_to_an_sae_that_has_begun(options: dict[str, Any]) -> None:
    x, (name, *_) = _data(300), [name for name in options if name != "kind"]
    spec = _spec(**({"kind": "relu"} | options))
    with pytest.raises(UnweaveError, match=rf"{name} = .* would have no effect"):
        SAETrainer(spec, D, init_x=x, start=_random_sae(ReLU()))
    assert SAETrainer(_spec(spec.kind), D, init_x=x, start=_random_sae(ReLU())).d_sae == 96
    if name == "threshold_init":  # which resampled latents begin with
        SAETrainer(dataclasses.replace(spec, resample_every=500), D, init_x=x, start=_random_sae(ReLU()))


def test_trap_31_a_skip_that_is_there_is_not_fitted() -> None:
    start, x = _random_sae(ReLU(), d_out=7), _data(300)
    with pytest.raises(UnweaveError, match="skip = 'fit' would have no effect"):
        SAETrainer(_spec("relu", skip="fit"), D, init_x=x, init_target=start(x), start=start)


def test_latents_that_are_no_multiple_of_the_width_come_from_the_start() -> None:
    whole = _random_sae(ReLU())
    start = SAE(whole.W_enc[:, :90], whole.b_enc[:90], whole.W_dec[:90], whole.b_dec, ReLU())
    x = _data(300)
    t = SAETrainer(_spec("relu"), D, init_x=x, start=start)  # whose expansion 8 is the default
    t.step(x[:50])
    assert t.d_sae == t.to_sae().d_sae == len(t.dead_for) == 90
    with pytest.raises(UnweaveError, match="90 latents, which is no multiple of its width 12: expansion 7"):
        SAETrainer(_spec("relu", expansion=7), D, init_x=x, start=start)


# -- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_trap_20_gated_folds_into_jump_relu_exactly(normalise: bool) -> None:
    t = _trainer("gated", normalise=normalise)
    _unsettle(t)
    w, x = t.weights, _data(200, seed=7)
    r_mag, b_mag = w.own["r_mag"], w.own["b_mag"]
    seen = (x - t._input.centre) * t._input.scale
    u = seen @ w.W_enc.T
    gate = u + w.b_enc > 0
    f = torch.relu(r_mag.exp() * u + b_mag) * gate
    y = (f @ w.W_dec + w.b_dec) / t._input.scale + t._input.centre
    sae = t.to_sae()
    assert isinstance(sae.activation, JumpReLU)
    torch.testing.assert_close(sae.encode(x), f / t._input.scale, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sae(x), y, rtol=1e-9, atol=1e-9)
    assert bool((~gate & (r_mag.exp() * u + b_mag > 0)).any())  # the gate decides somewhere


@pytest.mark.parametrize("kind", ["topk", "relu", "gated", "jumprelu", "matryoshka"])
@pytest.mark.parametrize("start", ["zero", "fit"])
def test_skip_transcoders_train_and_fold(kind: str, start: str) -> None:
    g = torch.Generator().manual_seed(3)
    x = _data(1000)
    linear = torch.randn(D, 7, generator=g).double()
    goal = x @ linear + torch.relu(x @ torch.randn(D, 7, generator=g).double()) + 2
    options = {"groups": [0.5, 0.5]} if kind == "matryoshka" else {}
    spec = _spec(kind, skip=start, **options)
    t = SAETrainer(spec, D, init_x=x, init_target=goal, dtype=torch.float64)
    assert bool(t.weights.W_skip is not None and t.weights.W_skip.any()) == (start == "fit")
    first = t.step(x[:50], goal[:50])["fvu"]
    for i in range(100):
        last = t.step(x[i * 10 : i * 10 + 50], goal[i * 10 : i * 10 + 50])["fvu"]
    assert last < max(0.7 * first, 0.1)
    _unsettle(t)
    sae = t.to_sae()
    if kind == "matryoshka":
        f = sae.encode(x)  # training chooses by batch
        assert sae.W_skip is not None
        y = f @ sae.W_dec + sae.b_dec + x @ sae.W_skip
        torch.testing.assert_close(sae(x), y)
        return
    torch.testing.assert_close(t.attempt(x, goal).y, sae(x), rtol=1e-9, atol=1e-9)
    fitted = torch.linalg.lstsq(x - x.mean(0), goal - goal.mean(0)).solution
    raw = init.skip_weights("fit", x, goal)
    assert (raw - fitted).norm() < 0.05 * fitted.norm()


def test_a_skip_needs_a_target() -> None:
    with pytest.raises(UnweaveError, match="identity"):
        _trainer("topk", skip="zero")


# -- schedules and the optimiser --------------------------------------------------------------------------------------


def test_the_cosine_schedule_has_its_values_step_by_step() -> None:
    """1,000 tokens in 20 steps: 4 of warm-up, 10 of cosine, 6 of decay."""
    spec = TopKSpec(
        tokens=1000, batch=50, schedule="cosine", lr=1.0, lr_end=0.1, warmup=0.2, decay=0.3
    )  # fmt: skip
    rates = [spec.learning_rate(50 * i) for i in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:14] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])
    assert rates[4] == 1 and rates[9] == pytest.approx(0.55)
    assert rates[14:] == pytest.approx([0.1 * (1 - i / 6) for i in range(6)])
    plain = TopKSpec(tokens=1000, batch=50, schedule="constant", lr=1.0, warmup=0.2)
    assert [plain.learning_rate(50 * i) for i in range(20)] == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 17)
    tenth = TopKSpec(tokens=1000, batch=50, schedule="cosine", lr=1.0, warmup=0.0, decay=0.0)
    assert tenth.learning_rate(950) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.95)) / 2)


def test_the_published_schedule_is_steps_of_the_paper() -> None:
    spec = SAESpec.from_dict({"preset": "fast-jumprelu"})
    steps = spec.tokens // spec.batch
    assert steps == 320_000
    wanted = {
        0: 7e-5 / 16_000,
        15_999: 7e-5,
        16_000: 7e-5,
        136_000: (7e-5 + 7e-6) / 2,
        255_999: 7e-6 + 63e-6 * (1 + math.cos(math.pi * 239_999 / 240_000)) / 2,
        256_000: 7e-6,
        288_000: 3.5e-6,
        319_999: 7e-6 / 64_000,
    }
    for step, rate in wanted.items():
        assert spec.learning_rate(step * 128) == pytest.approx(rate, rel=1e-9), step
    rises = {0: 1e-4, 4_999: 0.5, 9_999: 1.0, 20_000: 1.0}
    for step, share in rises.items():
        assert spec.rise(spec.sparsity_warmup, step * 128) == pytest.approx(share, rel=1e-9), step


def test_stages_of_p_annealing() -> None:
    spec = PAnnealSpec(tokens=1000, anneal_start=0.2, anneal_end=0.6, anneal_updates=5, p_end=0.5)
    assert [spec.stage(t) for t in (0, 199, 200, 299, 300, 400, 500, 599, 600, 1000)] == [
        0, 0, 1, 1, 2, 3, 4, 4, 5, 5,
    ]  # fmt: skip
    assert [spec.power(i) for i in (0, 1, 5, 9)] == pytest.approx([1, 0.9, 0.5, 0.5])


def test_gradients_are_clipped_together_after_the_decoders_part_is_removed() -> None:
    free, clipped = _trainer("topk"), _trainer("topk", clip=0.01)
    for t in (free, clipped):
        t.step(_data(50, seed=3))
    grads = [[p.grad for p in t.weights.named().values()] for t in (free, clipped)]
    sizes = [math.sqrt(sum(float(g.square().sum()) for g in some if g is not None)) for some in grads]
    assert sizes[0] > 0.02 and sizes[1] == pytest.approx(0.01, rel=1e-4)
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a / sizes[0], b / sizes[1], rtol=1e-4, atol=1e-9)


# -- specs and presets -----------------------------------------------------------------------------------------------


def test_presets_are_the_papers_table() -> None:
    jump, relu = (SAESpec.from_dict({"preset": name}) for name in ("fast-jumprelu", "fast-relu"))
    for spec in (jump, relu):
        assert (spec.lr, spec.lr_end, spec.schedule, spec.beta1, spec.beta2) == (7e-5, 7e-6, "cosine", 0.9, 0.999)
        assert (spec.tokens, spec.batch, spec.expansion, spec.seed) == (40_960_000, 128, 8, 42)
        assert spec.warmup * spec.tokens / spec.batch == 16_000 and spec.decay * spec.tokens / spec.batch == 64_000
        assert spec.sparsity_warmup * spec.tokens / spec.batch == 10_000
        assert (spec.centre, spec.normalise, spec.bias_init, spec.init) == ("none", False, "median", "independent")
        assert spec.aux_weight == 0 and spec.resample_every == 0 and spec.dead_after == 1000 * 128
    assert (jump.kind, jump.penalty, jump.sparsity) == ("jumprelu", "step", 0.01)
    assert (jump.bandwidth, jump.threshold_init, jump.threshold_parameter) == (0.001, 0.001, "log")
    assert jump.threshold_by_norm
    assert (relu.kind, relu.sparsity) == ("relu", 5.0)
    assert get_args(get_args(SAESpec.shorthands["preset"][0])[0]) == tuple(PRESETS)


def test_fast_thresholds_begin_at_the_norms_of_the_decoder_rows_as_drawn() -> None:
    """Appendix A of FAST: Kaiming-uniform rows are set to norm 1, and thresholds are adjusted accordingly."""
    x = _data(300)
    spec = SAESpec.from_dict({"preset": "fast-jumprelu"})
    t = SAETrainer(spec, D, init_x=x, dtype=torch.float64)
    g = torch.Generator().manual_seed(spec.seed)
    drawn = (2 * torch.rand(t.d_sae, D, generator=g) - 1).double() * math.sqrt(6 / D)  # torch.nn.init.kaiming_uniform_
    norms = drawn.square().sum(1).sqrt()
    torch.testing.assert_close(t.weights.W_dec.detach(), drawn / norms[:, None], rtol=1e-5, atol=1e-7)
    assert isinstance(spec, JumpReLUSpec)
    threshold = spec.threshold(t.weights).detach()
    assert float(norms.max() / norms.min()) > 1.5
    torch.testing.assert_close(threshold, 0.001 * norms, rtol=1e-5, atol=0)
    assert float(threshold.square().mean().sqrt()) == pytest.approx(0.001 * math.sqrt(2), rel=0.05)
    torch.testing.assert_close(t.weights.b_enc.detach(), torch.zeros(t.d_sae).double())  # adjusted, 0 stays 0
    goal = x[:, :5] @ torch.randn(5, 7, generator=g).double()  # a transcoder's norms are those of its own decoder rows
    code = SAETrainer(spec, D, init_x=x, init_target=goal, dtype=torch.float64)
    assert code.weights.W_dec.shape[1] == 7
    own = spec.threshold(code.weights).detach()
    assert float((own - threshold).abs().max()) > 1e-4
    assert float(own.square().mean().sqrt()) == pytest.approx(0.001 * math.sqrt(2), rel=0.05)


def test_a_preset_trains() -> None:
    for name in PRESETS:
        x = _data(300)[:, :3]  # fewer latents than the k that it leaves alone
        t = SAETrainer(SAESpec.from_dict({"preset": name, "tokens": 512}), 3, init_x=x)
        while not t.done:
            row = t.step(x[:128])
        assert math.isfinite(row["loss"]) and row["lr"] < 7e-5
    with pytest.raises(UnweaveError, match="of only"):
        SAETrainer(TopKSpec(), 3, init_x=x)


def test_presets_stand_under_what_is_given(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("sae: {preset: fast-jumprelu, tokens: 5000}\n")
    spec = TrainSpec.from_file(path).sae
    assert (spec.kind, spec.tokens, spec.batch) == ("jumprelu", 5000, 128)
    assert TrainSpec.from_file(path, {"sae.preset": "fast-relu", "sae.lr": "1e-3"}).sae.lr == 1e-3
    assert "sae.preset" in {leaf.name for leaf in leaves(TrainSpec)}  # and so on the command line
    assert SAESpec.from_dict(spec.to_dict()) == spec and "preset" not in spec.to_dict()
    base = TopKSpec(tokens=7000, k=8)
    assert SAESpec.from_dict({"preset": "fast-relu"}, base=base).tokens == 7000
    with pytest.raises(UnweaveError, match=r"no preset 'fast'[\s\S]*fast-relu"):
        SAESpec.from_dict({"preset": "fast"})


REFUSED = [
    ("topk", {"sparsity": 1.0}), ("topk", {"sparsity_warmup": 0.1}), ("topk", {"bandwidth": 0.1}),
    ("topk", {"groups": [1.0]}), ("topk", {"p_end": 0.5}), ("topk", {"lr_end": 1e-4}),
    ("topk", {"schedule": "constant", "decay": 0.1}), ("topk", {"k_aux": 3, "aux_weight": 0.0}),
    ("batchtopk", {"multi_topk": 0.1}), ("relu", {"multi_topk": 0.1}), ("relu", {"sparsity": 1.0, "k": 3}),
    ("relu", {"sparsity_warmup": 0.1}), ("relu", {"penalty": "tanh"}), ("gated", {"threshold_init": 0.1}),
    ("gated", {"anneal_start": 0.1}), ("gated", {"anneal_end": 0.9}), ("relu", {"anneal_updates": 3}),
    ("jumprelu", {"tanh_scale": 3.0}), ("jumprelu", {"preact_on": "all"}), ("relu", {"preact_weight": 1.0}),
    ("jumprelu", {"penalty": "step", "sparsity": 0.1, "k": 7}), ("relu", {"threshold_parameter": "log"}),
    ("jumprelu", {"penalty": "step", "sparsity_warmup": 0.1}), ("jumprelu", {"threshold_by_norm": True}),
    ("relu", {"threshold_by_norm": True, "init": "independent"}),
]  # fmt: skip


def test_thresholds_begin_at_zero_or_above() -> None:
    assert JumpReLUSpec(threshold_init=0.0).threshold_init == 0
    for options in ({"threshold_init": -1e-31}, {"threshold_init": 0.0, "threshold_parameter": "log"}):
        with pytest.raises(UnweaveError, match="must be"):
            SAESpec.from_dict({"kind": "jumprelu", **options})


@pytest.mark.parametrize(("kind", "options"), REFUSED)
def test_trap_31_options_without_an_effect_are_refused(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(UnweaveError, match=r"would have no effect: it is only (for|where) [\s\S]*leave \w+ out, or "):
        SAESpec.from_dict({"kind": kind, **options})


CHANGES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "kind": ("topk", {}, "batchtopk"), "expansion": ("topk", {}, 6), "k": ("topk", {}, 5),
    "sparsity": ("relu", {"sparsity": 0.1}, 0.2), "sparsity_warmup": ("relu", {"sparsity": 0.1}, 0.5),
    "tokens": ("topk", {"decay": 0.5}, 900), "batch": ("topk", {"warmup": 0.5}, 60), "seed": ("topk", {}, 1),
    "lr": ("topk", {}, 1e-2), "schedule": ("topk", {}, "cosine"), "lr_end": ("topk", {"schedule": "cosine"}, 1e-3),
    "warmup": ("topk", {}, 0.5), "decay": ("topk", {}, 0.9), "beta1": ("topk", {}, 0.5), "beta2": ("topk", {}, 0.9),
    "clip": ("topk", {}, 0.1), "init": ("topk", {}, "random"), "centre": ("topk", {}, "median"),
    "normalise": ("topk", {}, False), "bias_init": ("topk", {"centre": "none"}, "mean"),
    "aux_weight": ("topk", {"dead_after": 60}, 0.5), "k_aux": ("topk", {"dead_after": 60}, 2),
    "dead_after": ("topk", {}, 60), "resample_every": ("topk", {}, 200), "multi_topk": ("topk", {}, 0.1),
    "groups": ("matryoshka", {}, [0.5, 0.5]), "p_end": ("p-anneal", {"anneal_start": 0.0}, 0.9),
    "anneal_start": ("p-anneal", {}, 0.1), "anneal_end": ("p-anneal", {"anneal_start": 0.0}, 0.1),
    "anneal_updates": ("p-anneal", {"anneal_start": 0.0}, 3), "penalty": ("jumprelu", {}, "tanh"),
    "tanh_scale": ("jumprelu", {"penalty": "tanh"}, 3.0), "bandwidth": ("jumprelu", {"threshold_init": 0.1}, 0.2),
    "threshold_init": ("jumprelu", {}, 0.2), "threshold_parameter": ("jumprelu", {}, "log"),
    "threshold_by_norm": ("jumprelu", {"init": "independent", "threshold_init": 0.1}, True),
    "preact_weight": ("jumprelu", {"dead_after": 60, "threshold_init": 0.5}, 0.1),
    "preact_on": ("jumprelu", {"preact_weight": 0.1}, "all"),
    "skip": ("topk", {"skip": "zero"}, "fit"), "freeze": ("topk", {}, "decoder"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", sorted({f.name for kind in SAESpec.members.values() for f in dataclasses.fields(kind)})
)
def test_trap_31_every_field_changes_training(name: str) -> None:
    kind, options, other = CHANGES[name]
    traces = []
    for change in ({}, {name: other}):
        values = {"kind": kind, "tokens": 1000, "aux_weight": 0.1, **options, **change}
        spec = _spec(values.pop("kind"), **values)
        x = _data(400)
        goal = x @ torch.ones(D, 5).double() + x[:, :5] ** 2 if "skip" in options else None
        t = SAETrainer(spec, D, init_x=x, init_target=goal, dtype=torch.float64)
        traces.append([])
        while not t.done and t.steps < 20:
            rows = torch.arange(t.steps * 50, t.steps * 50 + 50) % 400
            traces[-1].append(t.step(x[rows], None if goal is None else goal[rows])["loss"])
    assert traces[0] != traces[1]
