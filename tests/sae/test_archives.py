"""Files of tensors: what they claim is compared with what they hold before anything is expanded or made."""

from __future__ import annotations

import io
import json
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.sae_files import K, N, X, base, linear, saelens, sparsify, v6
from unweave.core.errors import UnweaveError
from unweave.sae.formats.archives import read_arrays
from unweave.sae.formats.headers import checked_header
from unweave.sae.formats.state_dict import read_state_dict
from unweave.sae.formats.tensors import read_safetensors
from unweave.sae.module import SAE


def bounded(read: Callable[[], object], says: str) -> None:
    """It is refused within three seconds, in which memory is traced, and 100 MB."""
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(UnweaveError, match=says) as caught:
            read()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert caught.value.where and caught.value.remedy
    assert time.process_time() - start < 3 and peak < 100 << 20


# -- .pt -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [True, False])
def test_saved_dictionaries_are_read_as_pytorch_reads_them(archive: bool, tmp_path: Path) -> None:
    W = torch.randn(7, 5)
    tensors = OrderedDict(
        parameter=torch.nn.Parameter(torch.randn(3, 4)), turned=W.T, shared=W, part=W[2:4, 1:3], half=W.half(),
        bf=W.bfloat16(), wide=W.double(), k=torch.tensor(5), small=torch.tensor([1, 2], dtype=torch.int32),
        truth=torch.tensor(True), empty=torch.empty(0, 3),
    )  # fmt: skip
    for n, what in enumerate((tensors, dict(tensors), torch.nn.Linear(3, 4).state_dict())):
        path = tmp_path / f"{n}.pt"
        torch.save(what, path, _use_new_zipfile_serialization=archive)
        found, wanted = read_state_dict(path), torch.load(path, weights_only=True)
        assert list(found) == list(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def test_a_small_file_claims_no_large_tensor(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    for tensor in (
        torch.ones(1).expand(60_000, 60_000), torch.ones(100).expand(10**6, 100),
        torch.ones(20).as_strided((10**5, 10**5), (0, 0), 3),
    ):  # fmt: skip
        torch.save(linear(encoder__bias=N["be"], bias=N["bd"]) | {"encoder.weight": tensor}, path)
        assert path.stat().st_size < 20_000
        bounded(lambda: SAE.load(path), "claims more numbers than")
    many = {f"t{n}": t for n, t in enumerate([torch.ones(300_000)] * 400)}  # one storage under 400 names
    torch.save(many, path)
    bounded(lambda: read_state_dict(path), "its tensors claim 480,000,000 bytes")


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], out: Path) -> Path:
    """The archive with its members changed; None leaves one out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return out


def test_tables_of_tensors_that_lie(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.pt", tmp_path / "ae.pt"
    torch.save({"W": torch.ones(2, 3)}, whole)
    count, shape = b"K\x06t", b"K\x02K\x03\x86"
    huge = b"\x8a\x08" + struct.pack("<q", 1 << 40)

    def table(old: bytes, new: bytes) -> Path:
        def change(name: str, data: bytes) -> bytes:
            if not name.endswith("data.pkl"):
                return data
            assert data.count(old) == 1
            return data.replace(old, new)

        return rewritten(whole, change, out)

    assert torch.equal(read_state_dict(table(b"X\x01\x00\x00\x00W", b"X\x01\x00\x00\x00V"))["V"], torch.ones(2, 3))
    assert torch.equal(
        read_state_dict(table(b"}q\x00", b"}r\xff\xff\xff\x7f"))["W"], torch.ones(2, 3)
    )  # a note far away
    cases = [
        (count, huge + b"t", "should hold"),
        (count, b"K\x07t", "should hold"),
        (count, b"J\xff\xff\xff\xfft", "damaged"),
        (shape, huge * 2 + b"\x86", "claims more"),
        (shape, b"J\xff\xff\xff\xffK\x03\x86", "damaged"),
        (shape, b"\x88K\x03\x86", "damaged"),
        (shape, b"K\x03\x85", "damaged"),
        (b"FloatStorage", b"QuantStorage", "Python objects"),
        (b"_rebuild_tensor_v2", b"_rebuild_qtensor", "Python objects"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001", "lacks"),
        (b"}q\x00", b"]q\x00", "damaged"),
        (b"}q\x00", b"c__builtin__\nbytearray\nq\x00", "Python"),
        (b"\rs.", b"\rs", "damaged"),
        (b"}q\x00", b"(" * 3_000_000 + b"}q\x00", "steps|bytes"),
    ]
    for old, new, says in cases:
        path = table(old, new)
        bounded(lambda path=path: read_state_dict(path), says)
    twice = b"X\x01\x00\x00\x00W"
    pickled = zipfile.ZipFile(whole).read("whole/data.pkl")
    entry = pickled[pickled.index(twice) : -len("s.")]
    bounded(lambda: read_state_dict(table(entry + b"s.", entry + b"s" + twice + b"K\x05s.")), "appears twice")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(out, "w") as new:
        for name in ("a/data.pkl", "a/data/0", "a/data/0"):
            new.writestr(name, zipfile.ZipFile(whole).read(f"whole/{name[2:]}"))
    bounded(lambda: read_state_dict(out), "appears twice")
    big = rewritten(whole, lambda name, data: b"big" if name.endswith("byteorder") else data, out)
    bounded(lambda: read_state_dict(big), "byte order")


# -- .npz ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_reads_them(save: Any, tmp_path: Path) -> None:
    arrays = {
        "x": np.random.randn(3, 4), "columns": np.asfortranarray(np.random.randn(3, 4).astype("f4")),
        "big": np.arange(5).astype(">f4"), "one": np.float32(3), "none": np.zeros((0, 3)), "half": np.ones(3, "f2"),
        "k": np.int64(3), "zeros": np.zeros(100_000, "f4"),
    }  # fmt: skip
    save(tmp_path / "a.npz", **arrays)
    found = read_arrays(tmp_path / "a.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(found[name].numpy(), array), name


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(path: Path, members: list[tuple[str, bytes]], packed: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def said(shape: str, descr: str = "'<f4'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


@pytest.mark.filterwarnings("ignore:Duplicate")
def test_arrays_that_lie(tmp_path: Path) -> None:
    path, four = tmp_path / "params.npz", b"\0" * 16
    good = npz(path, [("W.npy", npy(said("(2, 2)"), four))])
    assert torch.equal(read_arrays(good)["W"], torch.zeros(2, 2))
    lies = [
        (said("(10000000000, 10)"), "says its shape"),
        (said("(2, 3)"), "says its shape"),
        (said("(-2, -2)"), "invalid shape"),
        (said(f"({'9' * 3000},)"), "says its shape"),
        (said("(True, 4)"), "invalid shape"),
        (said("4"), "invalid shape"),
        (said("(2.0, 2)"), "invalid shape"),
        (said("(2, 2)", order="'no'"), "invalid shape"),
        (said("(2, 2)", "'<U1'"), "not plain"),
        (said("(4,)", "'|O'"), "Python objects"),
        (said("(4,)", "[('a', '<f4')]"), "Python objects"),
        (said("(4,)", "'<c8'"), "not plain"),
        ("(" * 3000, "cannot be read"),
        ("[" * 200 + "]" * 200, "does not say|cannot"),
        ("{}", "does not say"),
        ("x" * 5000, "header of 5,000"),
        (said("(4,)")[:-8], "cannot be read"),
        ("-" * 3000 + "1", "cannot|does not"),
    ]
    for header, says in lies:
        bounded(lambda header=header: read_arrays(npz(path, [("W.npy", npy(header, four))])), says)
    whole = npy(said("(2, 2)"), four)
    bounded(lambda: read_arrays(npz(path, [("W.npy", whole), ("W.npy", whole)])), "appears twice")
    bounded(lambda: read_arrays(npz(path, [("W.npy", whole), ("W", whole)])), "appears twice")
    bounded(lambda: read_arrays(npz(path, [("W.npy", whole)], zipfile.ZIP_LZMA)), "compressed in an unknown way")
    bounded(lambda: read_arrays(npz(path, [(f"{n}.npy", whole) for n in range(5000)])), "5,000 members")
    bomb = npy(said("(100000000,)"), b"\0" * 400_000_000)
    npz(path, [("W.npy", bomb)])
    assert path.stat().st_size < 1_000_000
    bounded(lambda: read_arrays(path), "would expand to")


def test_damaged_packing_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez_compressed(path, W=np.random.randn(40, 40).astype("f4"))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        at = archive.infolist()[0].header_offset
    for place in range(at + 100, len(whole) - 150, 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        bounded(lambda: read_arrays(path), "damaged")


# -- safetensors -----------------------------------------------------------------------------------------------------


def raw(path: Path, header: str, data: bytes = b"\0" * 16) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


def test_headers_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entry = '"W": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}'
    assert checked_header(raw(path, "{" + entry + "}")) == ["W"]
    assert torch.equal(read_safetensors(path).take("W"), torch.zeros(2, 2))
    lies = [
        ("{" + entry + ", " + entry + "}", "appears twice"),
        (entry, "JSON"),
        ("[]", "named fields"),
        ("{}", "take 0 bytes"),
        ("{" + entry.replace("[2, 2]", "[2, 3]") + "}", "W says"),
        ("{" + entry.replace("[2, 2]", "[-2, -2]") + "}", "whole"),
        ("{" + entry.replace("[2, 2]", "[4294967296, 4294967296]") + "}", "W says"),
        ("{" + entry.replace("[2, 2]", f"[{'9' * 5000}]") + "}", "damaged"),
        ("{" + entry.replace("F32", "Q8") + "}", "W says"),
        ("{" + entry.replace("[0, 16]", "[16, 32]") + "}", "overlap"),
        ("{" + entry.replace("16]", "16.5]") + "}", "whole"),
        ("{" + entry + ", " + entry.replace("W", "V") + "}", "overlap"),
        ("{" + entry.replace('"F32"', "32") + "}", "text"),
        ("{" + entry + ', "__metadata__": [1]}', "named fields"),
        ('{"W": ' * 3000 + "1" + "}" * 3000, "deeper"),
        ('{"W": []}', "named fields"),
        ('{"W": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}', "NaN"),
    ]
    for header, says in lies:
        bounded(lambda header=header: read_safetensors(raw(path, header)), says)
    bounded(lambda: read_safetensors(raw(path, "{" + entry + "}", b"\0" * 20)), "and 20 are there")
    for length in (0, 1, 1 << 40, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        bounded(lambda: read_safetensors(path), "header")


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_name_their_tensor_and_file(bad: float, tmp_path: Path) -> None:
    tensors = base() | {"threshold": N["t"]}
    for n, name in enumerate(tensors):
        damaged = tensors[name].clone()
        damaged.view(-1)[3] = bad
        np.savez(tmp_path / f"{n}.npz", **{k: v.numpy() for k, v in (tensors | {name: damaged}).items()})
        bounded(lambda n=n: SAE.load(tmp_path / f"{n}.npz"), f"{name} holds NaN or infinity")


def test_no_latents_are_refused_with_the_file(tmp_path: Path) -> None:
    empty = {"W_enc": torch.empty(12, 0), "b_enc": torch.empty(0), "W_dec": torch.empty(0, 12), "b_dec": N["bd"]}
    bounded(lambda: SAE.load(saelens(tmp_path / "a", v6("standard") | {"d_sae": None}, empty)), "latents")


def test_what_we_wrote_is_what_we_read(tmp_path: Path) -> None:
    """A bit that falls over in weights or settings of our own files is noticed, whatever the format."""
    sae = SAE.load(sparsify(tmp_path / "layers.1"))
    for format, file, config in (
        ("unweave", "sae_weights.safetensors", "cfg.json"), ("sparsify", "sae.safetensors", "cfg.json"),
        ("dictionary_learning", "ae.pt", "config.json"),
    ):  # fmt: skip
        folder = sae.save(tmp_path / format, format)
        torch.testing.assert_close(SAE.load(folder).encode(X), sae.encode(X))
        weights, settings = folder / file, folder / config
        whole, plain = weights.read_bytes(), settings.read_text()
        at = whole.index(N["Wd"][3:4].numpy().tobytes()) if format != "dictionary_learning" else None
        if at is not None:
            weights.write_bytes(whole[: at + 5] + bytes([whole[at + 5] ^ 1]) + whole[at + 6 :])
            bounded(lambda folder=folder: SAE.load(folder), "not those that were written")
        else:
            tensors: dict[str, Tensor] = torch.load(io.BytesIO(whole), weights_only=True)
            tensors["b_dec"][0] += 1e-6
            torch.save(tensors, weights)
            bounded(lambda folder=folder: SAE.load(folder), "not those that were written")
        weights.write_bytes(whole)
        settings.write_text(plain.replace(f'"k": {K}', f'"k": {K - 1}', 1))
        assert settings.read_text() != plain
        bounded(lambda folder=folder: SAE.load(folder), "k")
        settings.write_text(plain)
        told = json.loads((folder / "unweave.json").read_text()) if format == "sparsify" else json.loads(plain)
        own = told if format == "sparsify" else told.get("metadata", told)["unweave"]
        del own["written"]  # older files, and changes that are meant
        (folder / ("unweave.json" if format == "sparsify" else config)).write_text(json.dumps(told))
        assert SAE.load(folder).encode(X).shape[-1] == sae.d_sae
    save_file({k: v + 1e-6 for k, v in base().items()}, tmp_path / "unweave/sae_weights.safetensors")
    assert SAE.load(tmp_path / "unweave").d_sae == sae.d_sae
