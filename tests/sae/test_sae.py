"""The inference form of SAEs: folding, files, edits and provenance."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens
from unweave.sae import provenance
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.sae.edits import orthonormal_basis
from unweave.sae.module import SAE

D, F = 32, 48
SITE = Site("resid_post", 1)
IDS = torch.randint(0, 97, (2, 10), generator=torch.Generator().manual_seed(1))
KINDS = ("relu", "jumprelu", "topk")


def random_sae(kind: str = "relu", seed: int = 0, **about) -> SAE:  # type: ignore[no-untyped-def]
    """Non-zero parameters everywhere: a forgotten bias must show (trap 21)."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * 0.3

    activation = {"relu": ReLU(), "jumprelu": JumpReLU(draw(F).abs()), "topk": TopK(7)}[kind]
    about = {"read": Site("resid_post", 1)} | about
    return SAE(draw(D, F), draw(F), draw(F, D), draw(D), activation, **about)


@pytest.fixture(params=KINDS)
def sae(request: pytest.FixtureRequest) -> SAE:
    return random_sae(request.param)


def by_hand(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """Latents, one token and one latent at a time."""
    out = torch.zeros(len(x), F)
    for i, row in enumerate(x):
        z = [float(row @ sae.W_enc[:, j] + sae.b_enc[j]) for j in range(F)]
        winners = sorted(range(F), key=lambda j: -z[j])[:7]
        for j in range(F):
            alive = {
                "relu": True,
                "jumprelu": sae.kind == "jumprelu" and z[j] > float(sae.activation.threshold[j]),  # type: ignore[union-attr]
                "topk": j in winners,
            }[sae.kind]
            out[i, j] = max(z[j], 0.0) * alive
    return out


def test_encode_and_decode(sae: SAE) -> None:
    x = torch.randn(9, D)
    f = by_hand(sae, x)
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-4, atol=1e-5)
    expected = torch.stack([sum((f[i, j] * sae.W_dec[j] for j in range(F)), sae.b_dec) for i in range(9)])
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.codes(x)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct_sparsely(x.view(3, 3, D)).view(9, D), expected, rtol=1e-4, atol=1e-5)


def test_codes_are_the_latents_however_they_are_chunked(sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, D)
    monkeypatch.setattr("unweave.sae.module._DENSE_BYTES", 4 * F * 7)
    codes = sae.codes(x)
    assert isinstance(codes, Codes)
    torch.testing.assert_close(codes.dense(), sae.encode(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chosen", [[3], [5, 0, 41], list(range(0, F, 3))])
def test_subset_is_those_columns(sae: SAE, chosen: list[int]) -> None:
    x = torch.randn(4, 6, D)
    torch.testing.assert_close(sae.subset(chosen).encode(x), sae.encode(x)[..., chosen], rtol=1e-5, atol=1e-6)


def test_skip_connection() -> None:
    skip = torch.randn(D, D)
    sae, x = random_sae("relu", W_skip=skip), torch.randn(5, D)
    torch.testing.assert_close(sae(x), random_sae("relu")(x) + x @ skip)
    torch.testing.assert_close(sae.reconstruct_sparsely(x), sae(x), rtol=1e-4, atol=1e-5)


def edited(sae: SAE, edit, family: str = "llama", tiny=None) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    lm = LM(tiny(family), None)
    with lm.taps(read=["resid_post.1"]) as before:
        lm(IDS)
    with lm.taps(read=["resid_post.1"], edit=edit) as after:
        lm(IDS)
    return before["resid_post.1"], after["resid_post.1"]


def test_trap_37_edits_keep_the_error(sae: SAE, tiny) -> None:  # type: ignore[no-untyped-def]
    """Each edit against its formula with the whole SAE, its error computed once, before the edit."""
    for family in ("llama", "gemma2", "gpt2", "gpt_neox"):
        x, _ = edited(sae, None, family, tiny)
        f = sae.encode(x)
        error = x - sae.decode(f)
        clamped, zeroed = f.clone(), f.clone()
        clamped[..., 4], clamped[..., 9] = 5.0, -1.0
        zeroed[..., [2, 3]] = 0
        q = orthonormal_basis(sae.W_dec[[2, 3]])
        cases = [
            (sae.clamp({4: 5.0, 9: -1.0}), sae.decode(clamped) + error),
            (sae.ablate([2, 3]), sae.decode(zeroed) + error),
            (sae.add({4: 2.0}), x + 2 * sae.W_dec[4]),
            (sae.ablate([2, 3], mode="span"), x - x @ q.T @ q),
            (sae.reconstruct(), sae(x)),
        ]
        for edit, expected in cases:
            _, got = edited(sae, edit, family, tiny)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(got, x, atol=1e-3), edit


def test_clamping_to_the_present_value_changes_nothing(sae: SAE, tiny) -> None:  # type: ignore[no-untyped-def]
    lm = LM(tiny("llama"), None)
    inactive = [j for j in range(F) if not bool((sae.encode(edited(sae, None, "llama", tiny)[0])[..., j] > 0).any())]
    before = lm(IDS)
    for j in inactive[:2]:
        with lm.taps(edit=[sae.clamp({j: 0.0}), sae.ablate([j])]):
            assert torch.equal(lm(IDS), before)


def test_span_ablation_is_idempotent_and_survives_parallel_directions() -> None:
    directions = torch.randn(3, D)
    directions = torch.cat([directions, directions[:1] * -2, directions[:1] + 1e-7 * torch.randn(1, D)])
    q = orthonormal_basis(directions)
    assert q.shape == (3, D)
    x = torch.randn(5, D)
    once = x - x @ q.T @ q
    torch.testing.assert_close(once - once @ q.T @ q, once, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(once @ directions.T, torch.zeros(5, 5), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        orthonormal_basis(-directions.flip(0)).T @ orthonormal_basis(-directions.flip(0)), q.T @ q
    )


def test_edits_leave_alone_what_the_policy_leaves_out(tiny) -> None:  # type: ignore[no-untyped-def]
    lm = LM(tiny("llama"), None)
    with lm.taps(read=["resid_post.1"]) as seen:
        lm(IDS)
    x = seen["resid_post.1"]
    policy = TokenPolicy(exclude_ids=(int(IDS[0, 3]),), max_norm=float(x.norm(dim=-1).flatten().sort().values[-2]))
    sae = random_sae("relu", policy=policy)
    kept = policy.keep(x, IDS)
    assert 0 < int((~kept).sum()) < 6
    before, after = edited(sae, sae.clamp({1: 4.0}), "llama", tiny)
    changed = (before != after).any(-1)
    assert torch.equal(changed, kept)
    _, everywhere = edited(sae, sae.clamp({1: 4.0}, where="all"), "llama", tiny)
    assert bool((everywhere != before).any(-1).all())


def test_transcoder_edit_reads_one_site_and_writes_another(tiny) -> None:  # type: ignore[no-untyped-def]
    sae = random_sae("relu", read=Site("mlp_in", 1), write=Site("mlp_add", 1))
    lm = LM(tiny("gemma2"), None)
    with lm.taps(read=["mlp_in.1", "mlp_add.1"]) as seen:
        lm(IDS)
    f = sae.encode(seen["mlp_in.1"])
    with lm.taps(read=["mlp_add.1"], edit=sae.clamp({5: 3.0})) as after:
        lm(IDS)
    expected = seen["mlp_add.1"] + (3.0 - f[..., 5:6]) * sae.W_dec[5]
    torch.testing.assert_close(after["mlp_add.1"], expected, rtol=1e-4, atol=1e-4)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_22_every_tensor_survives_the_disk_bit_for_bit(sae: SAE, dtype: torch.dtype, tmp_path: Path) -> None:
    sae = sae.to(dtype)
    sae.policy, sae.provenance = TokenPolicy((0, 5), 12.5), {"model": {"name": "m"}}
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    for name, tensor in sae.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype and torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.read, loaded.policy, loaded.provenance) == (sae.read, sae.policy, sae.provenance)
    assert repr(loaded.activation) == repr(sae.activation)


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, "apply_b_dec_to_input": False} | config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def base(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in random_sae("relu", seed).state_dict().items()}


def test_trap_20_21_folding_against_each_architecture_s_own_formula(tmp_path: Path) -> None:
    x, p = torch.randn(20, D), base()
    options = {"apply_b_dec_to_input": True}
    relu = SAE.load(write(tmp_path / "a", {"architecture": "standard"} | options, p))
    own = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    torch.testing.assert_close(relu.encode(x), own, rtol=1e-4, atol=1e-4)
    topk = SAE.load(
        write(tmp_path / "b", {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True} | options, p)
    )
    norms = p["W_dec"].norm(dim=1)
    hidden = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * norms
    f = TopK(5)(hidden)
    torch.testing.assert_close(topk.encode(x), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(topk(x), (f / norms) @ p["W_dec"] + p["b_dec"], rtol=1e-4, atol=1e-4)
    gated_tensors = {k: v for k, v in p.items() if k != "b_enc"}
    gated_tensors |= {"b_gate": torch.randn(F), "b_mag": torch.randn(F), "r_mag": torch.randn(F) * 0.3}
    gated = SAE.load(write(tmp_path / "c", {"architecture": "gated"} | options, gated_tensors))
    gate = (x - p["b_dec"]) @ p["W_enc"]
    magnitude = torch.relu(gated_tensors["r_mag"].exp() * gate + gated_tensors["b_mag"])
    own = (gate + gated_tensors["b_gate"] > 0) * magnitude
    torch.testing.assert_close(gated.encode(x), own, rtol=1e-3, atol=1e-3)
    assert 0.05 < float((own > 0).float().mean()) < 0.95


def test_trap_19_strict_tensors(tmp_path: Path) -> None:
    p = base()
    jump = p | {"threshold": torch.rand(F)}
    with pytest.raises(UnweaveError, match="unused threshold"):
        SAE.load(write(tmp_path / "a", {"architecture": "standard"}, jump))
    with pytest.raises(UnweaveError, match="missing threshold"):
        SAE.load(write(tmp_path / "b", {"architecture": "jumprelu"}, p))
    with pytest.raises(UnweaveError, match="matching_pursuit"):
        SAE.load(write(tmp_path / "c", {"architecture": "matching_pursuit"}, p))
    with pytest.raises(UnweaveError, match="scaled"):
        SAE.load(write(tmp_path / "d", {"architecture": "standard", "normalize_activations": True}, p))
    for n, (bad, says) in enumerate([
        ({"activation_fn_str": "topk"}, "activation 'topk'"), ({"reshape_activations": "odd"}, "odd"),
        ({"architecture": "topk"}, "must say k"),
    ]):  # fmt: skip
        with pytest.raises(UnweaveError, match=says):  # traps 17 and 19
            SAE.load(write(tmp_path / f"o{n}", {"architecture": "standard"} | bad, p))
    with pytest.raises(UnweaveError, match="shape"):
        SAE.load(write(tmp_path / "e", {"architecture": "standard", "d_sae": F + 1}, p))
    with pytest.raises(UnweaveError, match="NaN"):
        SAE.load(write(tmp_path / "f", {"architecture": "standard"}, p | {"b_enc": torch.full((F,), float("nan"))}))


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    folder = random_sae("topk").save(tmp_path / "sae")
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"\x80\x04pickle"):
        weights.write_bytes(damaged)
        with pytest.raises(UnweaveError, match="damaged"):
            SAE.load(folder)
    weights.unlink()
    with pytest.raises(UnweaveError, match="missing"):
        SAE.load(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(UnweaveError, match="JSON"):
        SAE.load(folder)
    with pytest.raises(UnweaveError, match="no such SAE folder"):
        SAE.load(tmp_path / "nothing")


def test_saved_names_are_the_field_s(tmp_path: Path) -> None:
    config = json.loads((random_sae("jumprelu").save(tmp_path / "s") / "cfg.json").read_text())
    assert config["metadata"]["sae_lens_version"].startswith("6.")  # else SAELens drops the metadata
    assert config["architecture"] == "jumprelu" and config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert set(load_file(tmp_path / "s" / "sae_weights.safetensors")) == {
        "W_enc",
        "b_enc",
        "W_dec",
        "b_dec",
        "threshold",
    }


# -- provenance --------------------------------------------------------------------------------------------------------


def trained_in(lm: LM) -> SAE:
    sae = random_sae("topk")
    sae.provenance = {"model": provenance.describe_model(lm, sae)}
    return sae


def test_trap_12_14_25_wrong_model_or_layer_is_refused_with_the_evidence(tiny) -> None:  # type: ignore[no-untyped-def]
    lm = LM(tiny("llama"), None)
    sae = trained_in(lm)
    with lm.taps(edit=sae.ablate([1])):
        lm(IDS)
    changed = copy.deepcopy(lm.model)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    other = LM(changed, None)
    with pytest.raises(UnweaveError, match=r"differ by .*%"), other.taps(edit=sae.ablate([1])):
        other(IDS)
    sae.at("resid_post.0")
    with pytest.raises(UnweaveError, match="differ by"):
        copy.deepcopy(sae).verify(LM(lm.model, None))


def test_accepting_a_mismatch_is_recorded_and_saved(tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sae = trained_in(LM(tiny("llama"), None))
    other = LM(tiny("llama", seed=1), None)
    evidence = sae.accept(other, "to see what happens")
    assert evidence["distance"] > evidence["tolerance"]
    with other.taps(edit=sae.ablate([1])):
        other(IDS)
    assert SAE.load(sae.save(tmp_path / "s")).provenance["accepted"][0]["reason"] == "to see what happens"


def test_wrong_width_and_missing_site(tiny) -> None:  # type: ignore[no-untyped-def]
    lm = LM(tiny("llama"), None)
    with pytest.raises(UnweaveError, match="32 dimensions at mlp_act"):
        random_sae("relu", read=Site("mlp_act", 1)).verify(lm)
    nowhere = random_sae("relu", read=None)
    assert nowhere.encode(torch.randn(2, D)).shape == (2, F)
    with pytest.raises(UnweaveError, match="no site"), lm.taps(edit=nowhere.ablate([1])):
        lm(IDS)
    with lm.taps(edit=nowhere.at("resid_post.0").ablate([1])):
        lm(IDS)
    with pytest.raises(UnweaveError, match="32 dimensions, but was given 31"):
        nowhere.encode(torch.randn(2, 31))


@pytest.mark.parametrize(
    "latent", [1.7, "1", True, None, float("nan"), np.True_, torch.tensor(True), torch.tensor(1.0)]
)
def test_latents_are_whole_numbers(latent: object) -> None:
    sae = random_sae("relu")
    for build in (lambda: sae.clamp({latent: 1.0}), lambda: sae.add({latent: 1.0}), lambda: sae.ablate([latent])):  # type: ignore[dict-item,list-item]
        with pytest.raises(UnweaveError, match="not a latent"):
            build()
    x = torch.randn(3, D)
    assert torch.equal(sae.subset([np.int64(2), torch.tensor(3)]).encode(x), sae.encode(x)[:, [2, 3]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "2", b"2", None, True, [1.0], torch.ones(2, 2), np.True_, 1j, 1e39, 10**400]
)
def test_values_are_finite_numbers(value: object) -> None:
    sae = random_sae("relu")
    for build in (sae.clamp, sae.add):
        with pytest.raises(UnweaveError, match="value for latent 0"):
            build({0: value})  # type: ignore[dict-item]
    for mistaken in ([1.0], 3, None, "12"):
        with pytest.raises(UnweaveError, match="which values"):
            sae.clamp(mistaken)  # type: ignore[arg-type]
    x = torch.randn(1, 4, D)
    for same in (np.float32(2.0), torch.tensor(2.0), 2):
        one, other = (sae.clamp({0: value}).added(x, x, torch.ones(1, 4, dtype=torch.bool)) for value in (same, 2.0))  # type: ignore[dict-item]
        assert torch.equal(one, other)


@pytest.mark.parametrize("latents", ["12", 3, None, [], b"1", iter(())])
def test_ablation_of_what_is_no_latent_or_in_no_known_way_is_refused(latents: object) -> None:
    sae = random_sae("relu")
    with pytest.raises(UnweaveError, match=r"name latents|no latents"):
        sae.ablate(latents)  # type: ignore[arg-type]
    with pytest.raises(UnweaveError, match="unknown way to ablate"):
        sae.ablate([1], mode="half")  # type: ignore[arg-type]
    with pytest.raises(UnweaveError, match="twice"):
        sae.ablate([1, np.int64(1)])  # type: ignore[list-item]


@pytest.mark.parametrize("where", ["polcy", None, [], "padding", {"assistant", "nobody"}, 3, ["policy"]])
def test_where_says_which_tokens_or_is_refused(where: object) -> None:
    sae = random_sae("relu")
    builders = (lambda: sae.clamp({1: 2.0}, where=where), lambda: sae.ablate([1], where=where))  # type: ignore[arg-type]
    for build in (*builders, lambda: sae.add({1: 2.0}, where=where), lambda: sae.reconstruct(where=where)):  # type: ignore[arg-type]
        with pytest.raises(UnweaveError, match="which tokens to edit"):
            build()


def test_where_by_role_and_by_function(tiny) -> None:  # type: ignore[no-untyped-def]
    lm, sae = LM(tiny("llama"), None), random_sae("relu")
    roles = torch.tensor([[0, 2, 2, 3, 3, 0], [1, 1, 2, 3, 4, 5]], dtype=torch.uint8)
    tokens = Tokens(torch.arange(7, 19).view(2, 6), roles != int(Role.PAD), roles)
    with lm.taps(read=[SITE]) as before:
        lm(tokens)
    wanted = {
        "assistant": roles == 3, Role.USER: roles == 2, "special": roles == 0,
        frozenset({"system", "text"}): (roles == 1) | (roles == 4), "all": roles != 5,
    }  # fmt: skip
    cases = list(wanted.items())
    cases.append((["user", Role.ASSISTANT], (roles == 2) | (roles == 3)))
    cases.append((lambda at: at.ids % 2 == 0, (tokens.ids % 2 == 0) & (roles != 5)))
    for where, mask in cases:
        with lm.taps(read=[SITE], edit=sae.clamp({1: 4.0}, where=where)) as after:
            lm(tokens)
        assert torch.equal((before[SITE] != after[SITE]).any(-1), mask), where
    for wrong in (lambda at: at.ids, lambda at: at.mask[0], lambda at: None):
        with (
            pytest.raises(UnweaveError, match="one truth value per token"),
            lm.taps(edit=sae.clamp({1: 4.0}, where=wrong)),
        ):
            lm(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_have_one_rule_everywhere(dtype: torch.dtype) -> None:
    """Coarse weights, so that most tokens have a tie at the k-th place: the first of equal latents fire, k at most."""
    g = torch.Generator().manual_seed(0)
    n_latents, k = 400, 7
    W_enc = torch.randint(-1, 2, (D, n_latents), generator=g).to(dtype)
    W_dec = torch.randn(n_latents, D, generator=g).to(dtype)
    sae = SAE(W_enc, torch.zeros(n_latents, dtype=dtype), W_dec, torch.zeros(D, dtype=dtype), TopK(k), read=SITE)
    x = torch.randint(-2, 3, (64, D), generator=g).to(dtype)
    pre = sae.pre(x).tolist()
    wanted = torch.zeros(64, n_latents)
    tied = 0
    for row, z in enumerate(pre):
        order = sorted(range(n_latents), key=lambda j: (-z[j], j))
        tied += z[order[k - 1]] == z[order[k]]
        for j in order[:k]:
            wanted[row, j] = max(z[j], 0.0)
    assert tied > 32
    assert torch.equal(sae.encode(x).float(), wanted)
    assert torch.equal(sae.encode(x.view(4, 16, D)).float().view(64, -1), wanted)
    assert torch.equal(sae.codes(x).dense().float(), wanted)
    for chosen in ([5], [3, 200, 399, 0], list(range(0, n_latents, 3))):
        assert torch.equal(sae.subset(chosen).encode(x).float(), wanted[:, chosen])


def test_ties_at_zero_negative_entries_and_nan_have_the_same_rule() -> None:
    """Pre-activations as given, by an encoder that is the identity: k-th places at zero or below fire nothing."""
    z = torch.randint(-2, 3, (200, D), generator=torch.Generator().manual_seed(2)).float()
    z[:40] = -z[:40].abs()
    z[40:60] = 0.0
    z[60:80, :5], z[70:90, 3], z[80:100, 9] = 2.0, float("nan"), float("nan")
    z[100:110] = float("nan")
    for k in (1, 3, D - 1, D):
        sae = SAE(torch.eye(D), torch.zeros(D), torch.eye(D), torch.zeros(D), TopK(k), read=SITE)
        sae.pre = lambda x: x  # type: ignore[method-assign]  (a product would spread NaN)
        wanted = torch.zeros_like(z)
        for row in range(len(z)):
            order = sorted(range(D), key=lambda j: (not z[row, j].isnan(), -z[row, j].nan_to_num(0).item(), j))
            wanted[row, order[:k]] = torch.relu(z[row, order[:k]])
        found = [sae.encode(z), sae.codes(z).dense(), sae.subset(range(D)).encode(z)]
        found.append(torch.cat([sae.subset([j]).encode(z) for j in range(D)], 1))
        for one in found:
            torch.testing.assert_close(one, wanted, rtol=0, atol=0, equal_nan=True)
        assert sae.subset([]).encode(z).shape == (200, 0)


def test_gradients_reach_the_tied_latents_that_fire() -> None:
    """Pre-activations as given, many of them equal: the gradient of what fires is one, of all else zero."""
    z = torch.randint(1, 3, (40, 700), generator=torch.Generator().manual_seed(4)).float().requires_grad_()
    f = TopK(9)(z)
    f.sum().backward()
    assert z.grad is not None and torch.equal(z.grad, (f > 0).float()) and int(f.count_nonzero()) == 9 * 40


def test_an_sae_without_latents_or_with_too_many_winners_is_refused() -> None:
    with pytest.raises(UnweaveError, match="needs inputs and latents"):
        SAE(torch.ones(4, 0), torch.ones(0), torch.ones(0, 4), torch.ones(4), ReLU())
    with pytest.raises(UnweaveError, match="not floats"):
        SAE(torch.ones(4, 2).long(), torch.ones(2), torch.ones(2, 4), torch.ones(4), ReLU())
    with pytest.raises(UnweaveError, match="writes nothing"):
        SAE(torch.ones(4, 2), torch.ones(2), torch.ones(2, 0), torch.ones(0), ReLU())
    for k in (6, 10**30):
        with pytest.raises(UnweaveError, match="more than the 5 latents"):
            SAE(torch.ones(4, 5), torch.ones(5), torch.ones(5, 4), torch.ones(4), TopK(k))
    for k in (True, 5.0, 0, -1, "3"):
        with pytest.raises(UnweaveError, match="whole number"):
            TopK(k)  # type: ignore[arg-type]


def test_bad_latents() -> None:
    sae = random_sae("relu")
    with pytest.raises(UnweaveError, match="latent 48"):
        sae.clamp({F: 1.0})
    with pytest.raises(UnweaveError, match="twice"):
        sae.ablate([1, 1])
    with pytest.raises(UnweaveError, match="no latents"):
        sae.ablate([])
