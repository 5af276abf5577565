"""The documentation keeps its word: examples and snippets run, commands parse, names exist, tables are right."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import random
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from conftest import build_tiny, build_tiny_tokenizer
from test_layers import LAYERS, SOURCE
from unweave.cli import bridge
from unweave.cli.app import build_app
from unweave.cli.convert import convert
from unweave.cli.fields import leaves
from unweave.cli.stages import GROUPS, STAGES
from unweave.core.errors import UnweaveError
from unweave.core.site import LAYER_POINTS, MODEL_POINTS, Site
from unweave.core.spec import read_mapping
from unweave.judge import base as judge_base
from unweave.judge.scripted import Scripted
from unweave.lm.model import LM
from unweave.methods.train.spec import TrainSpec

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "src/unweave/papers/README.md",
]  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def fenced(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in one of the languages ("" for blocks that name none)."""
    return [code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def inline(page: Path) -> list[str]:
    """What stands between single backticks outside of code blocks."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def lines(page: Path) -> list[str]:
    """The command lines of a page's shell blocks, comments taken off."""
    found = [line for block in fenced(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [bare for line in found if (bare := re.sub(r"(^|\s)#.*", "", line).strip())]


# -- examples ---------------------------------------------------------------------------------------------------------


def example(name: str) -> Callable[[list[str]], int]:
    """The ``main`` of an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, text, and pairs of sentences."""
    folder = tmp_path_factory.mktemp("examples")
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    rng = random.Random(0)
    words = re.findall(
        r"\w+", "the keys to a cabinet are on the table near an old door while she was reading about rain"
    )
    texts = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(5, 10)))}) for _ in range(500)]
    (folder / "text" / "rows.jsonl").write_text("\n".join(texts))
    pairs = [
        {"clean_prefix": f"the {a} {p}", "patch_prefix": f"the {b} {p}", "clean_answer": "s", "patch_answer": "t"}
        for a, b in (("key", "hat"), ("cat", "dog"), ("sea", "bed"))
        for p in ("near", "with")
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def test_every_example_is_run_here() -> None:
    tested = set(re.findall(r'example\("(\w+)"\)\(', Path(__file__).read_text(encoding="utf-8")))
    assert {path.stem for path in EXAMPLES} == tested


def test_read_and_edit_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(home / "model"), "--site", "resid_post.1", "--max-new-tokens", "6"]
    assert example("read_and_edit")([*arguments, "--prompt", "the keys", "--other", "the old sea"]) == 0
    shown = capsys.readouterr().out.splitlines()
    before, patched = (next(line for line in shown if line.startswith(name)) for name in ("unedited", "patched"))
    assert before.split(maxsplit=1)[1] != patched.split(maxsplit=1)[1]
    with pytest.raises(UnweaveError, match=r"resid_post\.9"):
        example("read_and_edit")(["--model", str(home / "model"), "--site", "resid_post.9"])


@pytest.fixture(scope="module")
def trained(home: Path) -> str:
    """What the training example printed; its runs are in ``home/runs``."""
    arguments = [str(home / "text"), "--model", str(home / "model"), "--site", "resid_post.1"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        more = ["--runs", str(home / "runs"), "--tokens", "9000", "--context", "48"]
        assert example("train_on_my_text")([*arguments, *more]) == 0
    return printed.getvalue()


def sae_of(printed: str) -> Path:
    return Path(re.findall(r"^SAE: (.+)$", printed, re.M)[0])


def test_training_on_own_text(trained: str, home: Path) -> None:
    folder = sae_of(trained)
    assert (folder / "sae_weights.safetensors").is_file() and folder.is_relative_to(home / "runs")
    assert 0 < float(re.findall(r"unexplained variance ([\d.]+)", trained)[0]) < 1
    assert "fires on" in trained


def test_tracing_and_steering(trained: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(sae_of(trained)), "--pairs", str(home / "pairs.jsonl"), "--top", "3", "--max-new-tokens", "5"]
    assert example("trace_and_steer")(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("6 pairs") and len(re.findall(r" top$", shown, re.M)) == 3
    assert re.findall(r"^(unedited|strength \d)", shown, re.M) == ["unedited", "strength 1", "strength 2", "strength 4"]


def test_too_little_text_is_one_clear_error(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(home / "text"), "--model", str(home / "model"), "--site", "resid_post.1", "--runs", str(tmp_path)]
    assert example("train_on_my_text")([*arguments, "--tokens", "900000"]) == 2
    assert "remedy:" in capsys.readouterr().err


# -- commands ---------------------------------------------------------------------------------------------------------


class Understood(Exception):
    """Stops a command once its Spec is made."""


def understand(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses a command line as the real one and makes its Spec; a configuration file is taken as empty."""

    def execute(stage: Any, config: Path | None, overrides: dict[str, Any], runs: Path, machine: bool) -> None:
        stage.spec().from_file(None, overrides)
        raise Understood

    monkeypatch.setattr(bridge, "execute", execute)
    command, bound, _ = build_app().parse_args(shlex.split(line)[1:], print_error=False, exit_on_error=False)
    if command.__name__ == "command":
        with pytest.raises(Understood):
            command(*bound.args, **bound.kwargs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in lines(page):
        program = line.split()[0]
        if program == "unweave" and "--help" not in line:
            understand(line, monkeypatch)
        elif program == "python":
            assert (ROOT / line.split()[1]).is_file(), line
        elif program == "make":
            check_target(line)
    for code in inline(page):
        if code.startswith("unweave "):
            first, inner = code.split()[1], code.split()[2:3]
            assert first in (*STAGES, *GROUPS, "models", "dedup", "convert", "annotate", "COMMAND", "--help"), code
            assert first not in GROUPS or inner in ([], *([name] for name in GROUPS[first][1])), code
        elif re.match(r"make \w", code):
            check_target(code)


def check_target(line: str) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    target = next(word for word in line.split()[1:] if "=" not in word)
    assert target in targets, line


@cache
def options() -> frozenset[str]:
    """Every option of every command, and of the scripts in benchmarks and examples."""
    found = {"--runs", "--json", "--help", "--config", "--version"}
    for stage in (*STAGES.values(), *(stage for _, inner in GROUPS.values() for stage in inner.values())):
        found |= {f"--{leaf.name.replace('_', dash)}" for leaf in leaves(stage.spec()) for dash in "_-"}
    found |= {f"--{name}" for name in inspect.signature(convert).parameters}
    for script in (*EXAMPLES, *(ROOT / "benchmarks").glob("*.py")):
        text = script.read_text(encoding="utf-8")
        found |= set(re.findall(r'add_argument\("(--[\w-]+)"', text))
        found |= {f"--{name}" for name in re.findall(r'\("(\w+)", \d+\)', text)}
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_and_fields_that_are_named_exist(page: Path) -> None:
    fields = {leaf.name for leaf in leaves(TrainSpec)}
    groups = {name.rpartition(".")[0] for name in fields}
    for code in inline(page):
        if code.startswith("--"):
            assert code.split()[0] in options(), code
        elif re.fullmatch(r"(data|stream|sae)(\.[a-z_0-9]+)+", code) and not hasattr_of("sae", code):
            assert code in fields | groups, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configurations_make_specs(page: Path, tmp_path: Path) -> None:
    for language in ("yaml", "toml"):
        for block in fenced(page, language):
            path = tmp_path / f"file.{language}"
            path.write_text(block)
            assert TrainSpec.from_dict(read_mapping(path)) != TrainSpec()


def test_what_does_not_exist_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("unweave train --sae.kk 3", "unweave steer --latent 3", "unweave trane"):
        with pytest.raises(Exception, match=r"kk|sae|trane"):
            understand(line, monkeypatch)
    assert "--sae.kk" not in options() and "--sae.k" in options()
    for code in (
        "from unweave.lm.model import Nothing",
        "lm.tapps()",
        "lm.generate('a', editt=1)",
        "sae.clamp({}, at=1)",
    ):
        assert list(problems(ast.parse(code)))


# -- snippets ---------------------------------------------------------------------------------------------------------

HOMES = {
    "lm": "unweave.lm.model:LM",
    "sae": "unweave.sae.module:SAE",
    "tokens": "unweave.lm.model:Tokens",
    "records": "unweave.latents.records:Records",
    "trained": "unweave.core.run:Run",
    "trainer": "unweave.methods.train.trainer:SAETrainer",
}
"""What the snippets' usual names stand for."""


@cache
def home_of(name: str) -> Any:
    module, _, cls = HOMES[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def hasattr_of(name: str, code: str) -> bool:
    """Whether ``sae.policy`` and the like is an attribute, set in the class or in its ``__init__``."""
    cls, attribute = home_of(name), code.split(".")[1].partition("(")[0]
    return (
        hasattr(cls, attribute)
        or attribute in getattr(cls, "__annotations__", {})
        or f"self.{attribute}" in inspect.getsource(cls)
    )


def imported(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """(local name, object) of all that a snippet imports from this package; None where there is no such thing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unweave":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        yield alias.name, None
                        continue
                yield alias.asname or alias.name, getattr(module, alias.name)


def problems(tree: ast.AST) -> Iterator[str]:
    """Imports, attributes and keywords of a snippet that do not exist."""
    names = dict(imported(tree))
    yield from (f"import of {name}" for name, value in names.items() if value is None)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = node.value.id
            if owner in HOMES and not hasattr_of(owner, f"{owner}.{node.attr}"):
                yield f"{owner}.{node.attr}"
        if isinstance(node, ast.Call) and (called := target(node.func, names)) is not None:
            known = inspect.signature(called).parameters
            yield from (f"{ast.unparse(node.func)}({k.arg}=)" for k in node.keywords if k.arg and k.arg not in known)


def target(function: ast.expr, names: dict[str, Any]) -> Any:
    """The function or class that is called, where it can be told."""
    if isinstance(function, ast.Name):
        return names.get(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner = function.value.id
        found = getattr(home_of(owner) if owner in HOMES else names.get(owner), function.attr, None)
        return found if callable(found) else None
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_snippets_name_what_exists(page: Path) -> None:
    for snippet in fenced(page, "python"):
        compile(snippet, str(page), "exec")
        assert list(problems(ast.parse(snippet))) == []


FETCHES = "train.run("
"""A snippet with this would fetch a model and text; the training example is run instead."""


@pytest.fixture
def at_home(home: Path, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which the snippets' paths exist, a tiny model whatever name is loaded, a judge with one answer."""
    (home / "mine.jsonl").write_text((home / "pairs.jsonl").read_text())
    for stage, found in (("train", sae_of(trained).parent), ("latents", next((home / "runs").glob("latents-*")))):
        name = home / "runs" / f"{stage}-0123456789ab"
        if not name.exists():
            name.symlink_to(found)
    load = LM.load
    monkeypatch.setattr(LM, "load", lambda source, **options: load(str(home / "model"), device="cpu"))
    said = Scripted(lambda conversation: "name: [[a word]], score: [[3]]")
    monkeypatch.setattr(judge_base, "open_judge", lambda spec, folder: said)
    monkeypatch.chdir(home)


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_snippets_run(page: Path) -> None:
    for snippet in fenced(page, "python"):
        if FETCHES not in snippet:
            small = re.sub(r"\b1234\b", "12", snippet)
            if "transformer_lens" not in small:
                small = re.sub(r"(resid_post|mlp_add)\.\d", r"\1.1", small)
            exec(compile(small, str(page), "exec"), {"__name__": "snippet"})


# -- links and tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", text):
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            target_page = page.parent / path if path else page
            assert target_page.exists(), link
            assert not anchor or anchor in anchors(target_page), link


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(page: Path, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, without its head."""
    after = page.read_text(encoding="utf-8").split(heading, 1)[1]
    rows = [
        line for line in re.split(r"\n\n(?!\|)", after[after.index("\n|") + 1 :])[0].splitlines() if line[:1] == "|"
    ]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_table_of_sites_is_right() -> None:
    found = {row[0].strip("`"): row[-1] for row in table(ROOT / "docs" / "library.md", "## Sites")}
    for point in (*LAYER_POINTS, *MODEL_POINTS):
        site = Site(point, 3 if point in LAYER_POINTS else None)
        try:
            name = f"`{site.to_transformer_lens().replace('blocks.3', 'blocks.N')}`"
        except UnweaveError:
            name = "none"
        assert found.pop(point if site.layer is None else f"{point}.N") == name
    assert list(found) == ["path.MODULE"]


def test_the_drawing_of_the_house_is_right() -> None:
    block = fenced(ROOT / "docs" / "architecture.md", "text")[0]
    named = re.findall(r"^ ?(\d+)  (methods/\S+|[a-z]+(?: [a-z]+)*)", block, re.M)
    drawn = {int(number): set(names.split()) for number, names in named}
    layers = [set(layer) for layer in LAYERS if layer not in (("unweave",), ("__main__",))]
    written = {"methods": "methods/<name>", "demo": "methods/demo"}
    assert drawn == {n: {written.get(name, name) for name in layer} for n, layer in enumerate(layers, 1)}
    there = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert there == set().union(*layers) - {"demo"}, "a layer for every package, and no layer without one"


def test_every_metric_is_explained() -> None:
    from unweave.methods.evaluate.metrics import CoreMetrics

    measure = (ROOT / "docs" / "measure.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", measure))
    assert set(CoreMetrics.__dataclass_fields__) - {"firing_counts"} <= named
