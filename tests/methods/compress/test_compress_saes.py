"""Pruned and rounded SAEs: the formula on their own activations, and the stored form bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models import VOCAB
from unweave import SAE, Site
from unweave.core.errors import UnweaveError
from unweave.data.policy import TokenPolicy
from unweave.inputs import identity
from unweave.inputs.saes import named_saes
from unweave.lm.model import LM, Tokens
from unweave.methods.compress.masks import Pattern
from unweave.methods.compress.saes import changes_of, check_saes, norms_of, prune_sae, round_sae, silenced
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.sae.formats import quantised

SITE = Site("resid_post", 1)
BATCHES = [Tokens.of(torch.randint(4, VOCAB, (3, 20), generator=torch.Generator().manual_seed(i))) for i in (0, 1)]


def sae_of(kind: str = "relu", d_out: int = 32, dtype: torch.dtype = torch.float32, **fields: Any) -> SAE:
    g = torch.Generator().manual_seed(3)
    activation = {"relu": ReLU(), "topk": TopK(4), "jumprelu": JumpReLU(torch.rand(48, generator=g, dtype=dtype))}[kind]
    numbers = (torch.randn(shape, generator=g).to(dtype) for shape in ((32, 48), (48,), (48, d_out), (d_out,)))
    fields = {"read": SITE, "policy": TokenPolicy((5, 6))} | fields
    return SAE(*numbers, activation, **fields)


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_wanda_on_an_sae_is_the_direct_formula(kind: str, norm: Any, tiny_lm: Callable[..., LM]) -> None:
    lm, sae = tiny_lm(), sae_of(kind, input_norm=norm)
    pruned = prune_sae(sae, 0.25, norms_of(lm, {SITE: sae}, BATCHES)[SITE])
    kept = []
    for batch in BATCHES:
        with lm.taps(read=[SITE]) as seen:
            lm(batch)
        kept.append(seen[SITE][(batch.ids != 5) & (batch.ids != 6)])
    x = torch.cat(kept)
    f = sae.encode(x)
    if norm is not None:
        x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    scores = sae.W_enc.abs() * (x - sae.b_dec).norm(dim=0)[:, None]
    gone = torch.zeros_like(scores, dtype=torch.bool).scatter(0, scores.argsort(dim=0, stable=True)[:8], True)
    assert torch.equal(pruned.W_enc, sae.W_enc.masked_fill(gone, 0.0))
    scores = sae.W_dec.abs() * f.norm(dim=0)[:, None]
    gone = torch.zeros_like(scores, dtype=torch.bool).scatter(0, scores.argsort(dim=0, stable=True)[:12], True)
    assert torch.equal(pruned.W_dec, sae.W_dec.masked_fill(gone, 0.0))
    at_centre = sae.b_dec @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(pruned.b_dec @ pruned.W_enc + pruned.b_enc, at_centre)  # the bias moved along
    assert torch.equal(pruned.b_dec, sae.b_dec) and pruned.provenance["compressed"] == ["pruned by wanda, 25 % sparse"]


def test_magnitude_patterns_and_transcoders() -> None:
    sae = sae_of(d_out=24, write=Site("mlp_add", 1), read=Site("mlp_in", 1))
    pruned = prune_sae(sae, 0.5, None)
    assert int((pruned.W_enc == 0).sum()) == 32 * 48 // 2 and torch.equal(pruned.b_enc, sae.b_enc)
    assert sae.W_enc[pruned.W_enc == 0].abs().max() <= sae.W_enc[pruned.W_enc != 0].abs().min()
    patterned = prune_sae(sae, Pattern(2, 4), None)
    assert ((patterned.W_enc.T.reshape(48, 8, 4) == 0).sum(2) == 2).all()
    assert ((patterned.W_dec.T.reshape(24, 12, 4) == 0).sum(2) == 2).all()
    for share, group, says in ((Pattern(1, 5), 0, "1:5 does not divide"), (0.5, 64, "groups of 64 do not divide")):
        with pytest.raises(UnweaveError, match=says):
            check_saes({SITE: sae}, share, group)
    with pytest.raises(UnweaveError, match="has no decoder"):
        check_saes({SITE: sae_of(d_out=0, encode_only="a layer of several")})


def test_an_sae_of_another_width_or_without_tokens_is_refused(tiny_lm: Callable[..., LM]) -> None:
    lm, sae = tiny_lm(), sae_of(read=Site("mlp_act", 1))  # that site is 64 wide
    with pytest.raises(UnweaveError, match="reads 32 dimensions, but was given 64"):
        norms_of(lm, {Site("mlp_act", 1): sae}, BATCHES)
    nothing = sae_of(policy=TokenPolicy(tuple(range(VOCAB))))
    with pytest.raises(UnweaveError, match="none of the calibration tokens counts"):
        norms_of(lm, {SITE: nothing}, BATCHES)


def test_silenced_latents_are_counted() -> None:
    sae = sae_of()
    W_dec = sae.W_dec.clone()
    W_dec[[3, 5]] = 0.0
    assert silenced(sae, sae.with_weights(sae.W_enc, sae.b_enc, W_dec, "")) == 2
    assert silenced(sae, sae) == 0


# -- the stored form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "transcoder"])
def test_a_rounded_sae_is_stored_and_read_bit_for_bit(bits: int, group: int, kind: str, tmp_path: Path) -> None:
    if kind == "transcoder":
        sae = sae_of(d_out=24, write=Site("mlp_add", 1), W_skip=torch.randn(32, 24))
    else:
        sae = sae_of(kind)
    rounded = round_sae(sae, bits, group)
    quantised.save(rounded, tmp_path / "a", bits, group)
    loaded = SAE.load(tmp_path / "a")
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.read, loaded.write, loaded.policy) == (sae.read, sae.write, sae.policy)
    quantised.save(loaded, tmp_path / "b", bits, group)
    for file in ("cfg.json", quantised.WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    codes = load_file(tmp_path / "a" / quantised.WEIGHTS)["W_enc.codes"]
    assert codes.dtype == (torch.int8 if bits == 8 else torch.uint8) and codes.shape == (48, 32 * bits // 8)
    change = changes_of(sae, rounded, (bits, group))[0]
    assert change.bits == bits + 32 / (group or 32) and 0 < change.change < (0.02 if bits == 8 else 0.2)
    assert named_saes([str(tmp_path / "a")]) == [(None, str(tmp_path / "a"))] and identity.sae(tmp_path / "a")


def test_half_precision_is_stored_as_what_it_stands_for(tmp_path: Path) -> None:
    rounded = round_sae(sae_of("jumprelu", dtype=torch.bfloat16), 8, 8)
    quantised.save(rounded, tmp_path, 8, 8)
    x = torch.randn(6, 32)
    torch.testing.assert_close(SAE.load(tmp_path)(x), rounded(x), rtol=0, atol=0)


def test_damaged_stored_forms_are_refused(tmp_path: Path) -> None:
    quantised.save(sae_of(), tmp_path, 4)
    path, config = tmp_path / quantised.WEIGHTS, tmp_path / "cfg.json"
    tensors, settings = load_file(path), json.loads(config.read_text())

    def damaged(tensors: dict[str, Any], settings: dict[str, Any], says: str) -> None:
        settings = json.loads(json.dumps(settings))
        settings["metadata"]["unweave"].pop("written")  # else any change is seen at once
        save_file(tensors, path)
        config.write_text(json.dumps(settings))
        with pytest.raises(UnweaveError, match=says):
            SAE.load(tmp_path)

    damaged({n: t for n, t in tensors.items() if n != "W_dec.scales"}, settings, "codes and scales of W_dec")
    damaged(tensors | {"W_enc.codes": tensors["W_enc.codes"][:, :-1].contiguous()}, settings, "of W_enc .*do not fit")
    damaged(tensors | {"W_enc.codes": tensors["W_enc.codes"].to(torch.int8)}, settings, "of W_enc .*do not fit")
    damaged(tensors | {"extra": torch.ones(1)}, settings, "extra")
    damaged(tensors, settings | {"quantised": {"bits": 5}}, "8 or 4 bits")
    damaged(tensors, settings | {"quantised": {}}, "8 or 4 bits")
    save_file(tensors | {"b_dec": tensors["b_dec"] + 1}, path)
    config.write_text(json.dumps(settings))
    with pytest.raises(UnweaveError, match="not those that were written"):
        SAE.load(tmp_path)
