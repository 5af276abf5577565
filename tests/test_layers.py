"""The house rules that a reader cannot see at a glance: who may import whom, and what is never done anywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.pages import fenced
from helpers.paths import ROOT, SOURCE, TESTS

# Bottom to top. A package imports only from itself and from strictly lower ones; those on one line never import each
# other. A method is a package of its own: none imports another. "unweave" is the package's own __init__ with the public
# names, which only the entry points may import.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("lm",),
    ("data", "judge", "show"),
    ("sae", "tasks"),
    ("inputs",),
    ("attribute",),
    ("latents",),
    ("circuits",),
    ("methods",),
    ("demo",),
    ("papers",),
    ("unweave",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

FILES = sorted(SOURCE.rglob("*.py"))


def package_of(path: Path) -> str:
    """`core` for unweave/core/site.py, `methods.train` for unweave/methods/train/stage.py, `unweave` for
    unweave/__init__.py, `__main__` for unweave/__main__.py."""
    parts = path.relative_to(SOURCE).parts
    if len(parts) == 1:
        return "unweave" if parts[0] == "__init__.py" else path.stem
    return unit(".".join(("unweave", *parts[:-1], path.stem)))


def unit(module: str) -> str:
    """What a module belongs to for the rule on imports: its package, or its method."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] == "methods" and parts[1:] not in ([], ["__init__"]) else parts[0]


def rank(name: str) -> int:
    return RANK["demo" if name == "methods.demo" else name.split(".")[0]]


def imported_modules(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import, wherever it stands; `from a import b` gives a.b too when a is
    a package of ours, for b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            if base == "unweave":
                public = {"__version__", "LM", "SAE", "Site", "UnweaveError", "UnweaveWarning"}
                yield from (
                    (node.lineno, base if alias.name in public else f"{base}.{alias.name}") for alias in node.names
                )
            else:
                yield node.lineno, base


def layer_breaches(tree: ast.AST, package: str, module: str) -> list[str]:
    breaches = []
    for line, name in imported_modules(tree, module):
        if name.split(".")[0] != "unweave":
            continue
        target = unit(name) if "." in name else "unweave"
        if target == package or (target == "methods" and package.startswith("methods.")):
            continue  # a method may ask which methods there are; it does not learn what they are
        if target.split(".")[0] not in RANK:
            breaches.append(f"line {line}: {name} is in no layer")
        elif rank(target) >= rank(package):
            breaches.append(f"line {line}: {package} (layer {rank(package)}) imports {name} (layer {rank(target)})")
    return breaches


def keyword_dumps(tree: ast.AST) -> list[str]:
    """Public functions and methods with `**kwargs`; closures and private ones are nobody's interface."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                public = not node.name.startswith("_") or node.name in ("__init__", "__call__", "__new__")
                if public and node.args.kwarg is not None:
                    yield f"line {node.lineno}: {prefix}{node.name}(**{node.args.kwarg.arg})"

    assert isinstance(tree, ast.Module)
    return list(visit(tree.body, ""))


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, dict[str, ast.expr]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func), {k.arg: k.value for k in node.keywords if k.arg}


def prints(tree: ast.AST) -> list[str]:
    return [f"line {node.lineno}: print" for node, name, _ in calls(tree) if name == "print"]


def _is(value: ast.expr | None, constant: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


UNPICKLERS = ("pickle", "dill", "joblib", "marshal", "cloudpickle")


def unsafe_loads(tree: ast.AST) -> list[str]:
    """Whatever could run code that a file carries."""
    found = []
    for node, name, keywords in calls(tree):
        head, _, last = name.rpartition(".")
        if (
            name in ("eval", "exec", "compile", "__import__")
            or (last in ("load", "loads", "Unpickler") and head.split(".")[-1] in UNPICKLERS)
            or (name == "torch.load" and not _is(keywords.get("weights_only"), True))
            or (name == "yaml.load" or last in ("unsafe_load", "full_load"))
            or ("trust_remote_code" in keywords and not _is(keywords["trust_remote_code"], False))
            or ("allow_pickle" in keywords and not _is(keywords["allow_pickle"], False))
            or ("shell" in keywords and not _is(keywords["shell"], False))
            or name == "os.system"
        ):
            found.append(f"line {node.lineno}: {name}")
    return found


def foreign_imports(tree: ast.AST, package: str, module: str) -> list[str]:
    """Libraries that belong to some layers only: core knows no transformers, and only the cli knows its toolkits."""
    kept_out = {"cyclopts", "rich"} if package != "cli" else set()
    if package == "core":
        kept_out |= {"transformers", "datasets"}
    return [f"line {line}: {name}" for line, name in imported_modules(tree, module) if name.split(".")[0] in kept_out]


def check(rule: Callable[[ast.AST, str, str], list[str]]) -> list[str]:
    breaches = []
    for path in FILES:
        relative = path.relative_to(SOURCE.parent).with_suffix("")
        module = ".".join(relative.parts)
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        breaches += [f"{relative}.py {breach}" for breach in rule(tree, package_of(path), module)]
    return breaches


def test_there_is_something_to_check() -> None:
    assert {"core", "cli", "unweave"} <= {package_of(path) for path in FILES}


def test_every_package_has_a_layer() -> None:
    assert {package_of(path).split(".")[0] for path in FILES} <= set(RANK)


def test_imports_go_down_only() -> None:
    assert check(layer_breaches) == []


def test_no_keyword_dumps_in_public_functions() -> None:
    assert check(lambda tree, package, module: keyword_dumps(tree)) == []


def test_only_the_command_line_prints() -> None:
    assert check(lambda tree, package, module: [] if package == "cli" else prints(tree)) == []


def test_nothing_is_loaded_that_could_run_code() -> None:
    assert check(lambda tree, package, module: unsafe_loads(tree)) == []


def test_libraries_stay_in_their_layers() -> None:
    assert check(foreign_imports) == []


def third_party(tree: ast.AST) -> set[str]:
    tops = {name.split(".")[0] for _, name in imported_modules(tree, "unweave.x.y")}
    return tops - set(sys.stdlib_module_names) - {"unweave"}


def test_what_is_imported_is_declared() -> None:
    """Every library that the code imports is a dependency or in an extra, never there by somebody else's courtesy."""
    project = tomllib.loads((SOURCE.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [asked for name, extra in project["optional-dependencies"].items() if name != "dev" for asked in extra]
    declared = {re.split(r"[\[<>=~! ]", asked)[0] for asked in [*project["dependencies"], *extras]}
    distribution = {"yaml": "pyyaml", "sklearn": "scikit-learn"}
    imported = {name for path in FILES for name in third_party(ast.parse(path.read_text(encoding="utf-8")))}
    assert {"torch", "yaml", "cyclopts"} <= imported
    assert sorted({distribution.get(name, name) for name in imported} - declared) == []


def unused_extras(extras: dict[str, list[str]], imported: set[str]) -> list[str]:
    """Extras of which no library is imported: promises without code."""
    names = {extra: {re.split(r"[\[<>=~! ;]", asked)[0] for asked in libraries} for extra, libraries in extras.items()}
    return [extra for extra, libraries in names.items() if extra != "dev" and not libraries & imported]


def test_every_extra_is_used() -> None:
    project = tomllib.loads((SOURCE.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    imported = {name for path in FILES for name in third_party(ast.parse(path.read_text(encoding="utf-8")))}
    assert unused_extras(project["optional-dependencies"], imported) == []
    assert unused_extras({"ray": ["ray>=2"], "gpu": ["triton>=3; sys_platform == 'linux'"]}, imported) == ["ray"]


def test_the_drawing_of_the_house_is_right() -> None:
    block = fenced(ROOT / "docs" / "architecture.md", "text")[0]
    named = re.findall(r"^ ?(\d+)  (methods/\S+|[a-z]+(?: [a-z]+)*)", block, re.M)
    drawn = {int(number): set(names.split()) for number, names in named}
    layers = [set(layer) for layer in LAYERS if layer not in (("unweave",), ("__main__",))]
    written = {"methods": "methods/<name>", "demo": "methods/demo"}
    assert drawn == {n: {written.get(name, name) for name in layer} for n, layer in enumerate(layers, 1)}
    there = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert there == set().union(*layers) - {"demo"}, "a layer for every package, and no layer without one"


def test_tests_have_the_tree_of_the_source_and_import_helpers_only() -> None:
    paths = sorted(TESTS.rglob("*.py"))
    folders = {path.parent.relative_to(TESTS) for path in paths} - {Path("helpers")}
    assert Path("core") in folders and [folder for folder in folders if not (SOURCE / folder).is_dir()] == []
    names = {path.stem for path in paths if path.parent.name != "helpers"}
    assert len(names) == len([path for path in paths if path.parent.name != "helpers"]), "a file's name is there twice"
    for path in paths:
        imported = {name for _, name in imported_modules(ast.parse(path.read_text(encoding="utf-8")), path.stem)}
        assert imported & names == set(), path


# Each rule must be able to find what it looks for.


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("lm", "from unweave.sae.module import SAE"),
        ("lm", "def f():\n    import unweave.data.tokens"),
        ("data", "from unweave.judge.client import Client"),
        ("methods.steer", "from unweave.methods.evaluate.stage import run"),
        ("methods.steer", "from unweave.methods.demo.stage import run"),
        ("show", "from ..judge import base"),
        ("sae", "from unweave import LM"),
        ("core", "from unweave import cli"),
        ("methods.train", "import unweave.nowhere"),
    ],
)
def test_breaches_of_the_layers_are_found(package: str, code: str) -> None:
    assert layer_breaches(ast.parse(code), package, f"unweave.{package}.module")


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("sae", "from unweave.core.site import Site\nfrom unweave.lm.model import LM\nfrom unweave.sae import edits"),
        ("methods.steer", "from . import themes\nfrom ...core.errors import UnweaveError"),
        ("methods.demo", "from unweave.methods.steer import stage"),
        ("cli", "from unweave import LM\nimport unweave"),
        ("core", "import torch"),
    ],
)
def test_what_is_allowed_passes(package: str, code: str) -> None:
    assert layer_breaches(ast.parse(code), package, f"unweave.{package}.module") == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(handle)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trust)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
    ],
)
def test_unsafe_loads_are_found(code: str) -> None:
    assert unsafe_loads(ast.parse(code))


def test_safe_loads_pass() -> None:
    code = "torch.load(p, weights_only=True)\nyaml.safe_load(t)\nmodel.eval()\nnp.load(p)\njson.load(h)\nre.compile(t)"
    assert unsafe_loads(ast.parse(code)) == []


def test_keyword_dumps_and_prints_are_found() -> None:
    tree = ast.parse("class A:\n    def f(self, **options): ...\ndef g(**kw):\n    print(kw)\ndef _h(**kw): ...")
    assert keyword_dumps(tree) == ["line 2: A.f(**options)", "line 3: g(**kw)"]
    assert prints(tree) == ["line 4: print"]
    assert foreign_imports(ast.parse("def f():\n    from transformers import AutoModel"), "core", "unweave.core.x")


def test_results_are_shown_without_torch() -> None:
    """Every method's specs, results and views are imported by themselves."""
    code = (
        "import sys, importlib\n"
        "from unweave.methods import METHODS\n"
        "for name in METHODS:\n"
        "    importlib.import_module(f'unweave.{name}.view')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
