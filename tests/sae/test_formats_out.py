"""Files that are refused, SAEs in every format out and back, inputs normalised per token, the hub, convert."""

from __future__ import annotations

import json
import pickle
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.paths import ROOT
from helpers.sae_files import OUT, D, F, K, N, Numbers, X, agrees, base, close, linear, saelens, sparsify, v6
from unweave.attribute.states import states
from unweave.cli.app import main
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.sae.formats import hub, registry
from unweave.sae.measure.evaluate import evaluate
from unweave.sae.module import SAE

IDS = torch.randint(0, 97, (2, 10), generator=torch.Generator().manual_seed(1))

# -- what is refused ---------------------------------------------------------------------------------------------------


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_files_that_carry_code_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"W_enc": Runs()}, "ae.pt")
    Path("raw.pt").write_bytes(pickle.dumps({"W_enc": Runs()}))
    np.savez("params.npz", W_enc=np.array([Runs()], dtype=object))
    for name, says in (("ae.pt", "Python objects"), ("params.npz", "Python objects"), ("raw.pt", "not a dictionary")):
        with pytest.raises(UnweaveError, match=says):
            SAE.load(name)
    assert not Path("ran").exists()
    torch.save([N["We"]], "list.pt")
    with pytest.raises(UnweaveError, match="not a dictionary of tensors"):
        SAE.load("list.pt")


def test_damaged_missing_and_misshapen(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", **{k: v.numpy() for k, v in base().items()}, threshold=N["t"].numpy())
    torch.save(linear(encoder__bias=N["be"], bias=N["bd"]), tmp_path / "whole.pt")
    for name in ("whole.npz", "whole.pt"):
        data = (tmp_path / name).read_bytes()
        for n, broken in enumerate((data[:-200], data[:40], b"")):
            path = tmp_path / f"{n}{name}"
            path.write_bytes(broken)
            with pytest.raises(UnweaveError, match="damaged"):
                SAE.load(path)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"W_enc": N["We"][:, :-1]}, r"W_enc has shape \[12, 19\]"),
        ({"W_dec": N["Wd"][:-1]}, r"W_dec has shape \[19, 12\]"),
        ({"b_dec": N["bd"][:-1]}, "W_dec has shape"), ({"b_enc": N["be"][None]}, "b_enc has shape"),
        ({"threshold": N["t"][:-1]}, "threshold has shape"), ({"threshold": None}, "missing threshold"),
        ({"extra": N["t"]}, "unused extra"), ({"W_enc": N["We"] * float("nan")}, "NaN"),
        ({"W_enc": N["We"].to(torch.int8)}, "int8"),
    ]  # fmt: skip
    for n, (change, says) in enumerate(bad):
        tensors = {k: v for k, v in (base() | {"threshold": N["t"]} | change).items() if v is not None}
        path = tmp_path / f"bad{n}.npz"
        np.savez(path, **{k: v.numpy() for k, v in tensors.items()})
        with pytest.raises(UnweaveError, match=says):
            SAE.load(path)


def test_what_is_no_sae_is_told_what_could_be_meant(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="no such SAE"):
        SAE.load(tmp_path / "nothing")
    with pytest.raises(UnweaveError, match="holds no weights"):
        SAE.load(tmp_path)
    save_file({"a": N["be"]}, tmp_path / "model.safetensors")
    with pytest.raises(UnweaveError, match=r"name one of its files: model\.safetensors"):
        SAE.load(tmp_path)
    with pytest.raises(UnweaveError, match="holds an encoder"):
        SAE.load(tmp_path / "model.safetensors")
    for layer in range(8):
        sparsify(tmp_path / f"repo/layers.{layer}")
    with pytest.raises(UnweaveError, match=r"name one: layers.0, .* and 2 more"):
        SAE.load(tmp_path / "repo")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architecture": "temporal"}, "temporal"), ({"architecture": "abstopk"}, "abstopk"),
        ({"activation_fn_str": "gelu"}, "gelu"), ({"normalize_activations": "covariance_whitening"}, "covariance"),
        ({"architecture": "topk"}, "must say k"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2, "a": 1}}, "kwargs a"),
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input"), ({"d_in": D + 1}, "d_in 13"),
    ],
)  # fmt: skip
def test_saelens_options_that_are_not_understood(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=says):
        SAE.load(saelens(tmp_path / "a", v6("standard") | config, base()))


# -- out, and back -----------------------------------------------------------------------------------------------------


def made(kind: str, **about: Any) -> SAE:
    n = Numbers(d_out=about.pop("d_out", None))
    activation = {"relu": ReLU(), "jumprelu": JumpReLU(n["t"]), "topk": TopK(K)}[kind]
    if about.pop("skip", False):
        about["W_skip"] = n["skip"]
    about = {
        "read": Site("resid_post", 1),
        "policy": TokenPolicy((0, 5), 12.5),
        "provenance": {"model": {"name": "m"}},
    } | about
    return SAE(n["We"], n["be"], n["Wd"], n["bd"], activation, **about)


TRANSCODES = {"read": Site("mlp_in", 1), "write": Site("mlp_add", 1)}
SAYS = {
    "unweave": [("relu", {}), ("jumprelu", {}), ("topk", {}), ("topk", TRANSCODES), ("topk", {"skip": True}),
                ("topk", TRANSCODES | {"skip": True}), ("relu", TRANSCODES | {"d_out": OUT}),
                ("topk", {"input_norm": "layer_norm"})],
    "saelens": [("relu", {}), ("jumprelu", {}), ("topk", {}), ("relu", TRANSCODES | {"skip": True, "d_out": OUT}),
                ("jumprelu", TRANSCODES), ("jumprelu", {"input_norm": "constant_norm"}), ("relu", {"read": None})],
    "dictionary_learning": [("relu", {}), ("jumprelu", {}), ("topk", {})],
    "sparsify": [("topk", {}), ("topk", {"skip": True}), ("topk", TRANSCODES), ("topk", TRANSCODES | {"skip": True})],
}  # fmt: skip
REFUSES = {
    "saelens": [("topk", TRANSCODES, "no TopK transcoders"), ("topk", {"skip": True}, "no TopK transcoders")],
    "dictionary_learning": [("relu", TRANSCODES, "no transcoders"), ("topk", {"skip": True}, "no transcoders"),
                            ("relu", {"input_norm": "layer_norm"}, "layer_norm")],
    "sparsify": [("relu", {}, "TopK only"), ("jumprelu", {}, "TopK only"),
                 ("topk", {"input_norm": "layer_norm"}, "layer_norm"),
                 ("topk", TRANSCODES | {"d_out": OUT}, "12 and 9")],
    "nonsense": [("relu", {}, "cannot be written as 'nonsense'")],
}  # fmt: skip


@pytest.mark.parametrize("format", SAYS)
def test_round_trips(format: str, tmp_path: Path) -> None:
    for n, (kind, about) in enumerate(SAYS[format]):
        sae = made(kind, **about)
        loaded = SAE.load(sae.save(tmp_path / str(n), format))
        agrees(loaded, sae.encode(X), sae(X))
        same = ("read", "write", "policy", "provenance", "input_norm", "kind")
        assert [getattr(loaded, name) for name in same] == [getattr(sae, name) for name in same]
        if format in ("unweave", "saelens"):  # nothing is folded, so nothing changes
            assert loaded.digest() == sae.digest()
        halved = SAE.load(made(kind, **about).to(torch.bfloat16).save(tmp_path / f"half{n}", format))
        before = made(kind, **about).to(torch.bfloat16).float()
        close(halved.float()(X), before(X))  # trap 22: no second rounding, whatever had to be folded


@pytest.mark.parametrize("format", REFUSES)
def test_formats_refuse_what_they_cannot_say(format: str, tmp_path: Path) -> None:
    for kind, about, says in REFUSES[format]:
        with pytest.raises(UnweaveError, match=says):
            made(kind, **about).save(tmp_path / "s", format)
    assert not (tmp_path / "s").exists()


def test_trap_22_only_folded_weights_change_dtype(tmp_path: Path) -> None:
    half = {k: v.to(torch.bfloat16) for k, v in base().items()}
    plain = SAE.load(saelens(tmp_path / "a", v6("standard"), half))
    assert {t.dtype for t in plain.state_dict().values()} == {torch.bfloat16}
    folded = SAE.load(saelens(tmp_path / "b", v6("standard", apply_b_dec_to_input=True), half))
    assert {t.dtype for t in folded.state_dict().values()} == {torch.float32}
    wide = {k: v.float() for k, v in half.items()}
    f = ((X - wide["b_dec"]) @ wide["W_enc"] + wide["b_enc"]).relu()
    close(folded.encode(X), f)


def test_trap_41_the_digest_names_the_numbers() -> None:
    sae = made("jumprelu")
    assert sae.digest() == made("jumprelu").digest() and len(sae.digest()) == 12
    others = [made("relu"), made("topk"), made("jumprelu", input_norm="layer_norm")]
    sae.activation.threshold[3] += 1e-3  # type: ignore[union-attr, operator]
    assert len({other.digest() for other in others} | {sae.digest(), made("jumprelu").digest()}) == 5


# -- inputs normalised token by token ----------------------------------------------------------------------------------


def by_hand(kind: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised input, scale, shift) by SAELens's formulas."""
    if kind == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = ((x - mean).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
        return (x - mean) / (std + 1e-5), std, mean
    c = x.shape[-1] ** 0.5 / x.square().sum(-1, keepdim=True).sqrt()
    return x * c, 1 / c, torch.zeros_like(c)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_normalised_inputs(norm: str, kind: str) -> None:
    sae, plain = made(kind, input_norm=norm), made(kind)
    n, scale, shift = by_hand(norm, X)
    f = plain.encode(n)
    agrees(sae, f, plain.decode(f) * scale + shift)
    close(sae.decode(sae.codes(X), X), plain.decode(f) * scale + shift)
    close(sae.subset([3, 0, 11, 4, 7]).encode(X), f[:, [3, 0, 11, 4, 7]])
    with pytest.raises(UnweaveError, match=f"normalises every token's input .{norm}"):
        sae.decode(f)
    with pytest.raises(UnweaveError, match="another length at every token"):
        _ = sae.subset([1]).directions
    assert bool(torch.isfinite(sae(torch.zeros(2, D))).all())
    with pytest.raises(UnweaveError, match="transcoder"):
        made(kind, input_norm=norm, **TRANSCODES)
    with pytest.raises(UnweaveError, match="transcoder"):
        sae.at("mlp_in.1", "mlp_add.1")
    with pytest.raises(UnweaveError, match="unknown input normalisation"):
        made(kind, input_norm="odd")


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])
def test_edits_scale_a_latent_s_part_by_the_token_s_factor(norm: str, tiny) -> None:  # type: ignore[no-untyped-def]
    n = Numbers(d_in=32, d_sae=40)
    sae = SAE(n["We"], n["be"], n["Wd"], n["bd"], JumpReLU(n["t"]), input_norm=norm, read=Site("resid_post", 1))  # type: ignore[arg-type]
    lm = LM(tiny("llama"), None)
    with lm.taps(read=["resid_post.1"]) as seen:
        lm(IDS)
    x = seen["resid_post.1"]
    _, scale, _ = by_hand(norm, x)
    f = sae.encode(x)
    error = x - sae(x)
    clamped, zeroed, added = f.clone(), f.clone(), f.clone()
    clamped[..., 4], zeroed[..., [2, 3]], added[..., 5] = 5.0, 0.0, f[..., 5] + 2.0
    cases = [
        (sae.clamp({4: 5.0}), sae.decode(clamped, x) + error),
        (sae.ablate([2, 3]), sae.decode(zeroed, x) + error),
        (sae.add({5: 2.0}), sae.decode(added, x) + error),
        (sae.reconstruct(), sae(x)),
    ]
    for edit, expected in cases:
        with lm.taps(read=["resid_post.1"], edit=edit) as after:
            lm(IDS)
        torch.testing.assert_close(after["resid_post.1"], expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(after["resid_post.1"], x, atol=1e-3), edit
    close(cases[2][1] - x, 2.0 * scale * n["Wd"][5])
    tokens = Tokens(IDS, torch.ones_like(IDS, dtype=torch.bool), torch.zeros_like(IDS, dtype=torch.uint8))
    rows = x.flatten(0, 1).double()
    unexplained = (rows - sae(x).flatten(0, 1)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert evaluate(lm, sae, [tokens]).unexplained_variance == pytest.approx(float(unexplained), rel=1e-3)
    with pytest.raises(UnweaveError, match="normalises every token's input"):  # attribution's first step
        states(lm, sae, tokens)


# -- the hub, and the command ------------------------------------------------------------------------------------------


def test_hub_names_fetch_one_sae_s_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "0a1b2c")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    sparsify(tmp_path / "0a1b2c/sub/layers.4")
    sae = SAE.load("hub:EleutherAI/sae-x@v2/sub/layers.4")
    assert (asked["repository"], asked["revision"]) == ("EleutherAI/sae-x", "v2")
    assert "sub/layers.4/sae.safetensors" in asked["patterns"] and not any("*" in p for p in asked["patterns"])
    assert sae.read == Site("resid_post", 4)
    source = sae.provenance["source"]
    assert (source["repository"], source["revision"]) == ("EleutherAI/sae-x", "0a1b2c")  # trap 23: the commit itself
    folder = tmp_path / "0a1b2c/layer_20/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in base().items()}, threshold=N["t"].numpy())
    sae = SAE.load("hub:google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    assert sae.read == Site("resid_post", 20) and sae.provenance["model"]["name"] == "google/gemma-2-2b"
    save_file(base() | {"W_enc": N["We"].T.contiguous()}, tmp_path / "0a1b2c/layer_6.safetensors")
    (tmp_path / "0a1b2c/config.yaml").write_text("model_name: gpt2\n")
    assert SAE.load("hub:org/transcoders/layer_6.safetensors").d_sae == F
    with pytest.raises(UnweaveError, match="has no SAE at 'nowhere'"):
        SAE.load("hub:org/name/nowhere")
    with pytest.raises(UnweaveError, match="is not a name on the hub"):
        SAE.load("hub:justone")

    def fails(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(UnweaveError, match="cannot be fetched from the hub: no network"):
        SAE.load("hub:org/name")


def test_trap_19_a_file_named_on_the_hub_comes_with_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that brings what was asked for and nothing else."""
    remote, local = tmp_path / "remote", tmp_path / "0a1b2c"

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        del repository, revision
        shutil.rmtree(local, ignore_errors=True)
        for path in sorted(path for path in remote.rglob("*") if path.is_file()):
            name = path.relative_to(remote)
            if any(fnmatch(name.as_posix(), pattern) for pattern in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local / name)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    mine = made("topk")
    saelens(remote / "sub/a", v6("topk", k=K), base())
    saelens(remote, v6("topk", k=K + 1), base())
    mine.save(remote / "sub/layers.4", "sparsify")
    for name, k in (("sub/a/", K), ("", K + 1)):
        sae = SAE.load(f"hub:org/name/{name}sae_weights.safetensors")
        assert isinstance(sae.activation, TopK) and sae.activation.k == k
    sae = SAE.load("hub:org/name/sub/layers.4/sae.safetensors")
    assert (sae.kind, sae.read, sae.policy) == ("topk", mine.read, mine.policy)  # the last two are in unweave.json
    assert not (local / "sub/a").exists()


def test_saelens_releases() -> None:
    known = {
        "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71":
            ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"),
        "gemma-scope-9b-pt-att/layer_3/width_131k/average_l0_92":
            ("google/gemma-scope-9b-pt-att", "layer_3/width_131k/average_l0_92"),
        "llama_scope_lxm_32x/l31m_32x": ("fnlp/Llama3_1-8B-Base-LXM-32x", "Llama3_1-8B-Base-L31M-32x"),
        "gpt2-small-resid-post-v5-32k/blocks.0.hook_resid_post":
            ("jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", "v5_32k_layer_0.pt"),
        "gpt2-small-mlp-out-v5-128k/blocks.11.hook_mlp_out":
            ("jbloom/GPT2-Small-OAI-v5-128k-mlp-out-SAEs", "v5_128k_layer_11"),
        "gpt2-small-resid-mid-v5-32k/blocks.4.hook_resid_mid":
            ("jbloom/GPT2-Small-OAI-v5-32k-resid-mid-SAEs", "v5_32k_layer_4"),
        "gpt2-small-attn-out-v5-32k/blocks.4.hook_attn_out":
            ("jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs", "v5_32k_layer_4"),
        "pythia-70m-deduped-res-sm/blocks.0.hook_resid_post":
            ("ctigges/pythia-70m-deduped__res-sm_processed", "0-res-sm"),
        "pythia-70m-deduped-mlp-sm/blocks.2.hook_mlp_out":
            ("ctigges/pythia-70m-deduped__mlp-sm_processed", "2-mlp-sm"),
        "pythia-70m-deduped-res-sm/blocks.0.hook_resid_pre":
            ("ctigges/pythia-70m-deduped__res-sm_processed", "e-res-sm"),
        "pythia-70m-deduped-att-sm/blocks.5.hook_attn_out":
            ("ctigges/pythia-70m-deduped__att-sm_processed", "5-att-sm"),
        "gemma-2-2b-res-matryoshka-dc/blocks.8.hook_resid_post":
            ("chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40", "standard/blocks.8.hook_resid_post"),
    }  # fmt: skip
    for name, place in known.items():
        assert hub.released(f"saelens:{name}") == place
    for unknown in (
        "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical",
        "nothing/x",
        "llama_scope_lxr_8x/9",
        "llama_scope_lxr_8x/l15m_8x",  # kind and width of both halves must agree
        "llama_scope_lxr_8x/l15r_32x",
        "pythia-70m-deduped-att-sm/blocks.3.hook_mlp_out",
        "pythia-70m-deduped-mlp-sm/blocks.0.hook_resid_pre",
        "gpt2-small-mlp-out-v5-32k/blocks.3.hook_resid_post",
        "gpt2-small-resid-post-v5-32k/blocks.3.hook_resid_mid",
        "gpt2-small-resid-out-v5-32k/blocks.3.hook_resid_out",
    ):
        with pytest.raises(UnweaveError, match="unknown SAELens name"):
            hub.released(f"saelens:{unknown}")


def test_a_release_of_a_changed_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    saelens(tmp_path / "blocks.3.hook_resid_pre", v6("standard"), base())
    with pytest.warns(UnweaveWarning, match="centred"):  # trap 12
        SAE.load("saelens:gpt2-small-res-jb/blocks.3.hook_resid_pre")


def test_convert(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made("topk").save(tmp_path / "mine")
    assert main(["convert", "mine", "--to", "sparsify", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["sae"] == "mine-sparsify" and facts["reads"] == "resid_post.1" and facts["difference"] < 1e-5
    close(SAE.load("mine-sparsify")(X), made("topk")(X))
    assert main(["convert", "mine-sparsify", "--to", "dictionary_learning", "--out", "a/b"]) == 0
    assert "SAE folder (dictionary_learning): a/b" in capfd.readouterr().out
    assert main(["convert", "a/b", "--to", "saelens", "--out", "mine"]) == 2
    assert "taken" in capfd.readouterr().err
    Path("empty").mkdir()
    for format in registry.WRITERS:  # into a folder that is there already
        assert main(["convert", "mine", "--to", format, "--out", "empty"]) == 0
        close(SAE.load("empty")(X), made("topk")(X))
        for path in Path("empty").iterdir():
            path.unlink()
    with monkeypatch.context() as patch:  # whatever is written is too far off
        patch.setattr("unweave.cli.convert._TOLERANCE", -1.0)
        for out in ("off", "empty"):
            assert main(["convert", "mine", "--to", "saelens", "--out", out]) == 2
            assert "gives other reconstructions" in capfd.readouterr().err
    assert not Path("off").exists() and not list(Path("empty").iterdir())
    made("relu", read=None).save(tmp_path / "nowhere")
    assert main(["convert", "nowhere", "--to", "sparsify"]) == 2
    assert "TopK only" in capfd.readouterr().err and not Path("nowhere-sparsify").exists()
    assert main(["convert", "nowhere", "--to", "unweave", "--write", "mlp_add.1"]) == 2
    assert "--site" in capfd.readouterr().err
    assert main(["convert", "nowhere", "--to", "saelens", "--site", "mlp_in.2", "--write", "mlp_add.2"]) == 0
    placed = SAE.load("nowhere-saelens")
    assert (placed.read, placed.write) == (Site("mlp_in", 2), Site("mlp_add", 2))


def test_every_format_is_written_down() -> None:
    text = (ROOT / "docs/formats.md").read_text()
    for format in registry.FORMATS:
        assert format.NAME.replace("_", " ") in text.lower().replace("_", " ").replace("-", " "), format.NAME
    for name in registry.WRITERS:
        assert f"`{name}`" in text
