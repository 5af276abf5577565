"""Training: gradients and terms against independent references, exact resumption, folding, clocks, errors."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.methods.train import init, objectives
from unweave.methods.train.kinds import JumpReLUSpec, SAESpec, TopKSpec
from unweave.methods.train.trainer import SAETrainer
from unweave.sae.activations import JumpReLU, ReLU, TopK

KINDS = ("topk", "batchtopk", "relu", "jumprelu")
D, K = 12, 4


def _data(n: int = 600, seed: int = 0, d: int = D) -> Tensor:
    """Sparse combinations of 40 directions around a mean that is not zero."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, d, generator=g)
    strength = torch.rand(n, 40, generator=g) * (torch.rand(n, 40, generator=g) < 0.1)
    return strength @ directions + torch.randn(d, generator=g) + 0.01 * torch.randn(n, d, generator=g)


def _trainer(kind: str = "topk", seed: int = 0, x: Tensor | None = None, **options: Any) -> SAETrainer:
    values = {"kind": kind, "k": K, "batch": 50, "tokens": 20_000, "seed": seed, "warmup": 0.0, "decay": 0.0}
    if kind == "jumprelu":
        values["bandwidth"] = 0.3
    data = _data() if x is None else x
    return SAETrainer(SAESpec.from_dict(values | options), data.shape[1], init_x=data)


def _unsettle(t: SAETrainer, seed: int = 0) -> None:
    """Biases and thresholds away from their first values (trap 21: tests that pass because a bias is zero)."""
    g = torch.Generator().manual_seed(seed)
    for p, size in ((t.weights.b_enc, 0.05), (t.weights.b_dec, 0.1)):
        p.data.add_(size * torch.randn(p.shape, generator=g))
    if "plain_threshold" in t.weights.own:
        t.weights.own["plain_threshold"].data.copy_(0.02 + 0.1 * torch.rand(t.d_sae, generator=g))


def _scaled(t: SAETrainer, x: Tensor) -> Tensor:
    """What the trainer sees, worked out from its definition."""
    start = _data().double()
    centre = start.mean(0)
    return (x.double() - centre) / (start - centre).square().sum(1).mean().sqrt()


# -- gradients of whole steps ----------------------------------------------------------------------------------------


def _oracle_gradients(t: SAETrainer, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    """Dense float64 autograd of the objective from its definition; the decoder's gradient without its radial part."""
    p = {name: v.detach().double().requires_grad_() for name, v in t.weights.named().items()}
    x = _scaled(t, x)
    z = x @ p["W_enc"].T + p["b_enc"]
    n, spec, loss = len(x), t.spec, torch.zeros((), dtype=torch.float64)
    if spec.kind == "topk":
        f = torch.relu(z) * (z >= z.topk(K, dim=1).values[:, -1:])
    elif spec.kind == "batchtopk":
        f = torch.relu(z) * (z >= z.flatten().topk(K * n).values[-1])
    elif spec.kind == "relu":
        f = torch.relu(z)
        loss = loss + t.state.coefficient * (f * p["W_dec"].norm(dim=1)).sum() / n
    else:
        theta, width = p["plain_threshold"], spec.bandwidth
        pull = theta - theta.detach()  # zero, with gradient 1
        near = ((z - theta).abs() < width / 2).double().detach()
        f = torch.where(z > theta, torch.relu(z), 0) - (theta / width * near).detach() * pull
        active = ((z > theta).double() - near / width * pull).sum() / n
        loss = loss + (active / K - 1) ** 2
    y = f @ p["W_dec"] + p["b_dec"]
    loss = loss + ((y - x) ** 2).sum() / n
    if len(dead) and spec.aux_weight:
        za = z[:, dead]
        kept = za >= za.topk(min(spec.k_aux, len(dead)), dim=1).values[:, -1:]
        said = (torch.relu(za) * kept) @ p["W_dec"][dead]
        rest = (x - y).detach()
        loss = loss + spec.aux_weight * ((rest - said) ** 2).sum() / (rest**2).sum()
    loss.backward()
    out = {name: v.grad for name, v in p.items() if v.grad is not None}
    row = p["W_dec"].detach()
    out["W_dec"] = out["W_dec"] - (out["W_dec"] * row).sum(1, keepdim=True) * row
    return out | {"loss": loss.detach()}


@pytest.mark.parametrize("k_aux", [None, 3, 500])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_step_are_the_dense_ones(kind: str, k_aux: int | None) -> None:
    options: dict[str, Any] = {"aux_weight": 0.0} if k_aux is None else {"k_aux": k_aux, "aux_weight": 0.5}
    t = _trainer(kind, expansion=16, **options)
    _unsettle(t)
    if k_aux is not None:
        t.dead_for[::3] = t.spec.dead_after
    x = _data(50, seed=3)
    wanted = _oracle_gradients(t, x, t.dead)
    row = t.step(x)
    assert row["loss"] == pytest.approx(float(wanted.pop("loss")), rel=1e-5)
    for name, parameter in t.weights.named().items():
        got = parameter.grad
        assert got is not None
        assert (got.double() - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name


def test_auxk_teaches_encoder_and_decoder_of_dead_latents_only() -> None:
    t = _trainer(expansion=8)
    x = t._input(_data(40))
    dead = torch.tensor([5, 17, 60])
    loss = objectives.auxk(x, x * 0.5, t.weights.W_enc, t.weights.b_enc, t.weights.W_dec, dead, 2)
    loss.backward()
    for p in (t.weights.W_enc, t.weights.b_enc, t.weights.W_dec):
        assert p.grad is not None
        touched = p.grad.reshape(t.d_sae, -1).abs().sum(1).nonzero().squeeze(1).tolist()
        assert touched and set(touched) <= set(dead.tolist())


def test_auxk_turns_dead_latents_to_what_is_unexplained_and_costs_nothing_without() -> None:
    x = _data(4000, seed=5)
    unsaid = {}
    for weight in (0.0, 1 / 32):
        t = _trainer(x=x, expansion=8, aux_weight=weight, dead_after=500, lr=3e-3)
        t.weights.W_enc.data[: t.d_sae // 2] *= 0.05  # half of the latents never win at first
        for i in range(150):
            t.step(x[torch.arange(i * 50, (i + 1) * 50) % len(x)])
        assert len(t.dead) > 20
        z, rest = t._input(x[:500]), t._input(x[:500]) - t._input(t.to_sae()(x[:500]))
        unsaid[weight] = float(
            objectives.auxk(z, rest, t.weights.W_enc, t.weights.b_enc, t.weights.W_dec, t.dead, t.spec.k_aux).detach()
        )
    assert unsaid[1 / 32] < 0.8 * unsaid[0.0]
    live, plain = _trainer(k_aux=2), _trainer(aux_weight=0.0)
    assert live.step(_data(50)) == plain.step(_data(50))


def test_auxk_revives_latents_that_never_win() -> None:
    """Half of the latents start too quiet to be chosen: with AuxK they come alive and the data are explained better."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(256, 48, generator=g)
    x = ((torch.rand(8000, 256, generator=g) < 0.03) * torch.rand(8000, 256, generator=g)) @ features + 1
    alive, unexplained = {}, {}
    for weight, aux in ((0.0, {}), (1 / 32, {"k_aux": 64})):
        t = _trainer(
            x=x, k=8, expansion=8, aux_weight=weight, dead_after=2000, lr=3e-3, tokens=160_000, init="random", **aux
        )
        t.weights.W_enc.data[:192] *= 0.05
        while not t.done:
            t.step(x[torch.randint(0, len(x), (200,), generator=g)])
        sae = t.to_sae()
        alive[weight] = int((sae.encode(x)[:, :192] > 0).any(0).sum())
        unexplained[weight] = float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert alive[0.0] < 64 and alive[1 / 32] > 160
    assert unexplained[1 / 32] < 0.9 * unexplained[0.0]


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_the_defaults_learn_more_of_the_same_tokens_than_few_large_steps_from_random_directions(kind: str) -> None:
    """96 planted directions of which 3 are active: what is left unexplained, of data that training has not seen."""
    g = torch.Generator().manual_seed(77)
    rows, away = torch.nn.functional.normalize(torch.randn(96, 32, generator=g), dim=1), torch.randn(32, generator=g)
    on = torch.rand(45_000, 96, generator=g) < 3 / 96
    x, held = ((on * (0.5 + torch.rand(45_000, 96, generator=g))) @ rows + away).split([40_000, 5_000])
    before = {"batch": 2048, "init": "random", "aux_weight": 1 / 32, "k_aux": 64, "dead_after": 100_000}
    unexplained = []
    for options in ({}, before):
        spec = SAESpec.from_dict({"kind": kind, "expansion": 4, "k": 4, "tokens": 81_920, **options})
        t = SAETrainer(spec, 32, init_x=x)
        while not t.done:
            t.step(x[torch.arange(t.tokens_seen, t.tokens_seen + t.spec.batch) % 40_000])
        y = t.to_sae()(held)
        unexplained.append(float((held - y).square().sum() / (held - held.mean(0)).square().sum()))
    assert unexplained[0] < 0.7 * unexplained[1]


# -- terms on fixed tensors (trap 30) ---------------------------------------------------------------------------------


def test_trap_30_terms_have_their_values() -> None:
    y, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert float(objectives.reconstruction(y, x)) == pytest.approx((4 + 9) / 2)
    f = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    assert float(objectives.l1(f, 2)) == pytest.approx(3.0)
    z, theta = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.3, 2.5]]), torch.tensor([0.2, 0.2, 2.2])
    assert objectives.jump_relu(z, theta, 0.1).tolist() == [[0.5, 0.0, 0.0], [0.0, pytest.approx(0.3), 2.5]]
    assert float(objectives.l0(z, theta, 0.1, 2)) == pytest.approx(1.5)
    assert float(objectives.off_target(objectives.l0(z, theta, 0.1, 2), 3)) == pytest.approx(0.25)


def test_trap_30_the_unexplained_share_is_the_definitions() -> None:
    t, x = _trainer(), _data(50, seed=2)
    y = t.to_sae()(x)
    wanted = (y - x).square().sum() / (x - x.mean(0)).square().sum()
    assert t.step(x)["fvu"] == pytest.approx(float(wanted), rel=1e-4)


def test_trap_30_auxk_has_its_value_and_its_weight_once() -> None:
    eye = torch.eye(3)
    x, residual = torch.tensor([[1.0, 2.0, -3.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    # Latents 1 and 2 are dead; pre-activations 2 and -3: latent 1 says 2, latent 2 is silent.
    value = objectives.auxk(x, residual, eye, torch.zeros(3), eye, torch.tensor([1, 2]), 5)
    assert float(value) == pytest.approx((1 + 1 + 1) / 3)
    t, plain = _trainer(aux_weight=0.25), _trainer(aux_weight=0.0)
    for trainer in (t, plain):
        trainer.dead_for[:10] = trainer.spec.dead_after
    x = _data(50, seed=2)
    z = t._input(x)
    y = plain.to_sae()(x)
    term = objectives.auxk(
        z, z - t._input(y), t.weights.W_enc, t.weights.b_enc, t.weights.W_dec, torch.arange(10), t.spec.k_aux
    )
    assert t.step(x)["loss"] - plain.step(x)["loss"] == pytest.approx(0.25 * float(term.detach()), rel=1e-3)


@pytest.mark.parametrize("width", [0.02, 0.1])
def test_straight_through_gradients_are_finite_differences_of_expectations(width: float) -> None:
    z = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[:, None]
    theta = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(objectives.l0(z, theta, width, len(z)), theta)
    up, down = (objectives.l0(z, theta.detach() + s * width / 2, width, len(z)) for s in (1, -1))
    assert float(g) == pytest.approx(float((up - down) / width), rel=1e-3)
    assert float(g) == pytest.approx(-0.5, rel=1e-3)  # minus the density of z
    (g,) = torch.autograd.grad(objectives.jump_relu(z, theta, width).mean(), theta)
    up, down = (objectives.jump_relu(z, theta.detach() + s * width / 2, width).mean() for s in (1, -1))
    assert float(g) == pytest.approx(float((up - down) / width), rel=1e-3)


def test_jump_relu_passes_values_through_and_l0_does_not() -> None:
    z = torch.tensor([[0.1, 0.5, -0.2]], requires_grad=True)
    theta = torch.full((3,), 0.2)
    objectives.jump_relu(z, theta, 0.05).sum().backward()
    assert z.grad is not None and z.grad.tolist() == [[0.0, 1.0, 0.0]]
    leaf = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(objectives.l0(z, leaf, 0.5, 1), z, allow_unused=True)
    assert g is None


# -- resumption, precision, counting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_trap_26_resumption_is_bit_exact(kind: str, stop: int) -> None:
    x = _data(500, seed=1)
    batches = x.split(50)
    options = {"dead_after": 100, "expansion": 10, "warmup": 0.01, "decay": 0.9}
    whole = _trainer(kind, **options)
    trace = [whole.step(b) for b in batches]
    first = _trainer(kind, **options)
    begun = [first.step(b) for b in batches[:stop]]
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    first.step(batches[0])  # what happens after the checkpoint does not reach into it
    stored.seek(0)
    second = _trainer(kind, seed=99, x=_data(300, seed=9), **options)
    second.load_state_dict(torch.load(stored, weights_only=True))
    assert begun + [second.step(b) for b in batches[stop:]] == trace
    a, b = whole.state_dict(), second.state_dict()
    assert str(a) == str(b)
    assert torch.equal(a["window"], b["window"]) and len(a["window"]) == (500 if kind == "batchtopk" else 0)
    for name, p in whole.weights.named().items():
        assert torch.equal(p, second.weights.named()[name])
    assert torch.equal(whole.generator.get_state(), second.generator.get_state())
    assert any(row["dead"] > 0 for row in trace)


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    with pytest.raises(UnweaveError, match="another SAE"):
        _trainer(expansion=4).load_state_dict(_trainer(expansion=8).state_dict())
    with pytest.raises(UnweaveError, match="another SAE"):
        _trainer("jumprelu").load_state_dict(_trainer("topk").state_dict())


def _reference_run(t: SAETrainer, batches: list[Tensor], lr: float, weights: torch.dtype) -> Tensor:
    """TopK training in float64 with weights kept in ``weights``: the encoder after the last batch."""
    p = {n: v.detach().double() for n, v in t.weights.named().items()}
    m = {n: torch.zeros_like(v) for n, v in p.items()}
    s = {n: torch.zeros_like(v) for n, v in p.items()}
    for i, x in enumerate(batches, 1):
        q = {n: v.clone().requires_grad_() for n, v in p.items()}
        x = _scaled(t, x)
        z = x @ q["W_enc"].T + q["b_enc"]
        f = torch.relu(z) * (z >= z.topk(K, dim=1).values[:, -1:])
        ((f @ q["W_dec"] + q["b_dec"] - x) ** 2).sum(1).mean().backward()
        for n, v in q.items():
            g = v.grad
            assert g is not None
            if n == "W_dec":
                g = g - (g * p[n]).sum(1, keepdim=True) * p[n]
            m[n] = 0.9 * m[n] + 0.1 * g
            s[n] = t.spec.beta2 * s[n] + (1 - t.spec.beta2) * g * g
            step = (m[n] / (1 - 0.9**i)) / ((s[n] / (1 - t.spec.beta2**i)).sqrt() + 1e-8)
            p[n] = (p[n] - lr * step).to(weights).double()
        p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
    return p["W_enc"]


def test_trap_27_a_thousand_tiny_steps_move_the_weights_as_float64_does() -> None:
    lr, x = 1e-6, _data(500, seed=4)
    t = _trainer(lr=lr, tokens=50_000, aux_weight=0.0)
    batches = [x[torch.arange(i * 7, i * 7 + 20) % 500] for i in range(1000)]
    start = t.weights.W_enc.detach().double().clone()
    exact = _reference_run(t, batches, lr, torch.float64) - start
    low = _reference_run(t, batches, lr, torch.bfloat16) - start.bfloat16().double()
    for b in batches:
        t.step(b.double())
    moved = t.weights.W_enc.detach().double() - start
    assert (moved - exact).norm() < 0.02 * exact.norm()
    assert (low - exact).norm() > 0.5 * exact.norm()  # the test tells the difference
    state = t.optimiser.state
    assert all(p.dtype == torch.float32 for p in t.weights.named().values())
    assert all(v.dtype == torch.float32 for s in state.values() for v in s.values())


@pytest.mark.parametrize("kind", KINDS)
def test_trap_27_low_precision_activations_train_fp32_weights(kind: str) -> None:
    t = _trainer(kind, x=_data().bfloat16())
    t.step(_data(50).bfloat16())
    assert all(p.dtype == torch.float32 for p in t.weights.named().values())
    assert t.to_sae().W_enc.dtype == torch.float32


def test_trap_28_every_batch_is_one_optimiser_step() -> None:
    t = _trainer(dead_after=100, expansion=10)
    for b in _data(500).split(70):
        t.step(b)
    assert t.steps == 8 and t.tokens_seen == 500
    assert {float(s["step"]) for s in t.optimiser.state.values()} == {8.0}


@pytest.mark.parametrize("kind", KINDS)
def test_trap_29_clocks_count_tokens_since_the_last_firing(kind: str) -> None:
    t = _trainer(kind, lr=1e-12, expansion=10)
    sizes, batches = [50, 30, 60], list(_data(140, seed=8).split([50, 30, 60]))
    fired = []
    for b in batches:
        z = t._input(b) @ t.weights.W_enc.detach().T + t.weights.b_enc.detach()
        if kind == "topk":
            z = z * (z >= z.topk(K, dim=1).values[:, -1:])
        elif kind == "batchtopk":
            z = z * (z >= z.flatten().topk(K * len(b)).values[-1])
        elif isinstance(t.spec, JumpReLUSpec):
            z = z * (z > t.spec.threshold(t.weights).detach())
        fired.append((z > 0).any(0))
        t.step(b)
    expected = torch.zeros(t.d_sae, dtype=torch.int64)
    for size, f in zip(sizes, fired, strict=True):
        expected = torch.where(f, 0, expected + size)
    assert torch.equal(t.dead_for, expected)
    assert kind == "relu" or int(expected.max()) == 140


def test_the_learning_rate_rises_stays_and_falls_over_the_tokens() -> None:
    t = _trainer(tokens=1000, batch=50, warmup=0.2, decay=0.5, lr=1.0)
    rates = []
    while not t.done:
        rates.append(t.learning_rate())
        t.tokens_seen += 50
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:11] == pytest.approx([1.0] * 7)
    assert rates[11:] == pytest.approx([1 - 0.1 * i for i in range(1, 10)])
    with pytest.raises(UnweaveError, match="over"):
        t.step(_data(50))


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_rows_keep_norm_one_and_training_helps(kind: str) -> None:
    x = _data(3000, seed=6)
    t = _trainer(kind, x=x, expansion=4, lr=3e-3, tokens=10_000)
    trace = [t.step(x[torch.arange(i * 50, i * 50 + 50) % 3000]) for i in range(200)]
    torch.testing.assert_close(t.weights.W_dec.norm(dim=1), torch.ones(t.d_sae))
    if kind in ("topk", "batchtopk"):
        assert trace[-1]["fvu"] < 0.6 * trace[0]["fvu"]
    else:
        assert abs(math.log(trace[-1]["l0"] / K)) < 0.7 * abs(math.log(trace[0]["l0"] / K))


# -- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("centre", ["mean", "median", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_trap_20_centring_and_scaling_fold_into_the_weights(kind: str, centre: str, normalise: bool) -> None:
    t = _trainer(kind, centre=centre, normalise=normalise)
    for b in _data(200).split(50):
        t.step(b)
    _unsettle(t)
    x = _data(80, seed=7)
    seen = (x.double() - t._input.centre.double()) * t._input.scale
    z = seen @ t.weights.W_enc.detach().double().T + t.weights.b_enc.detach().double()
    if kind == "topk":
        f = torch.relu(z) * (z >= z.topk(K, dim=1).values[:, -1:])
    elif kind == "relu":
        f = torch.relu(z)
    else:
        jumps = isinstance(t.spec, JumpReLUSpec)
        limit = t.spec.threshold(t.weights).detach().double() if jumps else t.batch_threshold()
        f = torch.relu(z) * (z > limit)
    y = (
        f @ t.weights.W_dec.detach().double() + t.weights.b_dec.detach().double()
    ) / t._input.scale + t._input.centre.double()
    sae = t.to_sae()
    torch.testing.assert_close(sae.encode(x), (f / t._input.scale).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), y.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(t.d_sae))
    wanted = {"topk": TopK, "relu": ReLU, "jumprelu": JumpReLU, "batchtopk": JumpReLU}[kind]
    assert isinstance(sae.activation, wanted)


def test_trap_19_batch_topk_keeps_k_per_token_on_average_and_folds_to_one_threshold() -> None:
    x = _data(4000, seed=2)
    t = _trainer("batchtopk", x=x, lr=1e-4, expansion=6)
    for i in range(100):
        assert t.step(x[torch.arange(i * 50, i * 50 + 50) % 4000])["l0"] == K
    sae = t.to_sae()
    assert isinstance(sae.activation, JumpReLU)
    assert len(set(sae.activation.threshold.tolist())) == 1
    assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(K, rel=0.15)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("batch", [256, 1024])
@pytest.mark.parametrize("steps", [1, 5, 10, 30])
def test_the_threshold_keeps_k_per_token_after_few_steps(kind: str, batch: int, steps: int) -> None:
    """Weights move fast in the first steps: what past steps found says little about the SAE as it stands."""
    x = _data(31 * batch, seed=3, d=24)
    t = _trainer(kind, x=x[:2000], lr=1e-2, expansion=8, batch=batch, tokens=100 * batch, k=8, init="random")
    for part in x[: steps * batch].split(batch):
        t.step(part)
    assert float((t.to_sae().encode(x[-batch:]) > 0).sum(1).float().mean()) == pytest.approx(8, rel=0.05)


def test_the_threshold_is_measured_on_rows_of_the_last_batches_with_the_weights_as_they_stand() -> None:
    sizes = [700, 1500, 300, 512, 513, 100, 2000, 1024, 900, 600, 1100, 4, 800]
    batches = list(_data(sum(sizes), seed=5).split(sizes))
    t = _trainer("batchtopk", lr=3e-3, expansion=5)
    for b in batches:
        t.step(b)
    kept = [t._input(b[:: math.ceil(len(b) / 512)]) for b in batches]
    rows = torch.cat(kept)[-4096:].double()
    z = rows @ t.weights.W_enc.detach().double().T + t.weights.b_enc.detach().double()
    wanted = z.flatten().sort(descending=True).values[K * 4096 - 1]
    assert t.batch_threshold() == pytest.approx(float(wanted), rel=1e-5)
    t.weights.b_enc.data.add_(0.25)
    assert t.batch_threshold() == pytest.approx(float(wanted) + 0.25, rel=1e-5)
    t.weights.b_enc.data.sub_(1e4)  # nothing is positive
    assert t.batch_threshold() == 0.0


def test_a_transcoder_learns_another_sites_activations() -> None:
    x = _data(2000)
    goal = x @ torch.randn(D, 7, generator=torch.Generator().manual_seed(1)) + 2
    spec = TopKSpec(k=K, batch=50, tokens=20_000, lr=3e-3, expansion=4)
    t = SAETrainer(spec, D, init_x=x, init_target=goal)
    trace = [t.step(x[i : i + 50], goal[i : i + 50]) for _ in range(6) for i in range(0, 2000, 50)]
    assert trace[-1]["fvu"] < 0.5 * trace[0]["fvu"]
    sae = t.to_sae()
    assert sae.d_out == 7
    missed = (sae(x) - goal).square().sum() / (goal - goal.mean(0)).square().sum()
    assert float(missed) == pytest.approx(trace[-1]["fvu"], rel=0.5)
    with pytest.raises(UnweaveError, match="transcoder"):
        t.step(x[:50])


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stops_training_and_leaves_the_weights(kind: str) -> None:
    t = _trainer(kind)
    t.step(_data(50))
    before = {n: p.detach().clone() for n, p in t.weights.named().items()}
    bad = _data(50)
    bad[3, 2] = float("nan")
    with pytest.raises(UnweaveError, match=r"NaN or infinity[\s\S]*step 1 [\s\S]*data"):
        t.step(bad)
    assert all(torch.equal(p, before[n]) for n, p in t.weights.named().items())
    assert t.steps == 1 and t.tokens_seen == 50


def test_a_loss_that_overflows_names_the_step_and_the_learning_rate() -> None:
    t = _trainer()
    t.weights.W_dec.data.fill_(1e30)
    with pytest.raises(UnweaveError, match=r"loss became[\s\S]*step 0 [\s\S]*lower lr[\s\S]*checkpoint"):
        t.step(_data(50))


def test_bad_starts_are_refused() -> None:
    with pytest.raises(UnweaveError, match="the same"):
        _trainer(x=torch.ones(30, D))
    with pytest.raises(UnweaveError, match="NaN"):
        _trainer(x=torch.full((30, D), float("nan")))
    with pytest.raises(UnweaveError, match="no activations"):
        _trainer(x=torch.empty(0, D))
    with pytest.raises(UnweaveError, match="of only"):
        _trainer(k=1000)
    with pytest.raises(UnweaveError, match=r"shape \[50, 7\]"):
        _trainer().step(torch.ones(50, 7))
    for wrong in ({"lr": 0.0}, {"k": 0}, {"decay": 1.5}, {"beta2": 1.0}, {"tokens": 0}):
        with pytest.raises(UnweaveError, match="must be"):
            SAESpec.from_dict(wrong)


# -- where training starts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["data", "random", "kaiming"])
def test_first_decoder_rows_are_distinct_unit_vectors(kind: init.InitKind) -> None:
    x = _data(50) - _data(50).mean(0)
    rows = init.unit_rows(init.drawn_rows(kind, 120, D, x, torch.Generator().manual_seed(0)))
    assert rows.shape == (120, D)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(120))
    assert float((rows @ rows.T - 2 * torch.eye(120)).max()) < 0.99999
    again = init.unit_rows(init.drawn_rows(kind, 120, D, x, torch.Generator().manual_seed(0)))
    assert torch.equal(rows, again)
    closeness = (rows @ init.unit_rows(x.clone()).T).max(1).values
    assert (float(closeness.min()) > 0.8) == (kind == "data")


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu"])
@pytest.mark.parametrize("start", ["data", "random", "kaiming"])
def test_the_first_reconstruction_has_the_size_of_the_data(kind: str, start: str) -> None:
    x = _data(3000)
    t = _trainer(kind, x=x, init=start, expansion=16)
    assert t.step(x[:500])["fvu"] < 1.0


def test_geometric_median_is_the_point_of_least_distance() -> None:
    x = torch.randn(41, 2, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 3.0])
    x[:5] += 40  # outliers that a mean would follow
    found = init.geometric_median(x)
    low, size = x.min(0).values, x.max(0).values - x.min(0).values
    best = torch.zeros(2)
    for _ in range(6):  # a grid, refined around its best point
        steps = torch.linspace(0, 1, 41)
        grid = low + torch.cartesian_prod(steps, steps) * size
        best = grid[torch.cdist(grid.double(), x.double()).sum(1).argmin()]
        size = size / 8
        low = best - size / 2
    assert float((found - best).norm()) < 1e-2
    assert float((x.mean(0) - best).norm()) > 1


def test_geometric_median_of_coincident_and_collinear_points() -> None:
    same = torch.full((9, 3), 2.5)
    assert torch.equal(init.geometric_median(same), same[0])
    line = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [10.0, 10.0]])
    assert init.geometric_median(line).tolist() == pytest.approx([2.0, 2.0], abs=1e-2)
    majority = torch.cat([torch.zeros(6, 2), torch.randn(4, 2)])
    assert float(init.geometric_median(majority).norm()) < 1e-2
    # The mean is a data point that is not the median: an estimate must not stick to it.
    sticky = torch.tensor([[0.0], [0.1], [0.2], [1.0], [3.7]])
    assert float(sticky.mean()) == pytest.approx(1.0)
    assert float(init.geometric_median(sticky)) == pytest.approx(0.2, abs=2e-2)
