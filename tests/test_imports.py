"""The layout's one rule: data flows one way, a file imports only from files to its left. Read off the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("trl_proxy", "baselines", "eval", "scripts")
# From left to right. Files of one entry stand beside each other and do not import one another.
ORDER = [
    ("quiet",),
    ("files", "devices"),
    ("config", "candidates", "gate", "advantages", "losses", "rewards", "checkpoints", "taps", "embedded"),
    ("rollout", "guards", "defaults", "proxies", "card", "caches"),
    ("actor_critic",),
    ("decoding",),
    ("generation",),
    ("modeling",),
    ("proxy_ppo", "ppo", "mara"),
    ("parsing", "progress"),
    ("runs",),
    ("__init__",),
    ("__main__",),
]
# What a package may import of the project; `trl_proxy` is the leftmost.
ALLOWED = {
    "trl_proxy": {"trl_proxy"},
    "baselines": {"trl_proxy", "baselines"},
    "eval": {"trl_proxy", "baselines", "eval"},
    "scripts": {"trl_proxy", "baselines", "eval", "scripts"},
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def imported_modules(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            # `from . import x` and `from trl_proxy import x` may name a module.
            names = [".".join([*base, alias.name]) for alias in node.names]
            found |= {".".join(base)} | {
                name for name in names if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
            }
    return found


def test_every_file_has_its_place():
    known = [name for group in ORDER for name in group]
    assert len(known) == len(set(known))
    assert {path.stem for path in (ROOT / "trl_proxy").glob("*.py")} <= set(known), "give the new file its place"


@pytest.mark.parametrize("path", sorted((ROOT / "trl_proxy").glob("*.py")), ids=lambda path: path.name)
def test_imports_go_to_the_left(path):
    place = {name: i for i, group in enumerate(ORDER) for name in group}
    for module in imported_modules(path):
        if module == "trl_proxy":
            # `from . import x` of a submodule is found under its own name; the package itself is to the right.
            assert all("." in name for name in imported_modules(path) if name.startswith("trl_proxy."))
            continue
        if module.startswith("trl_proxy."):
            name = module.split(".")[1]
            assert place[name] < place[path.stem], f"{path.name} imports {name}, which is not to its left"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_packages_import_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    used = {module.split(".")[0] for module in imported_modules(path)} & set(PACKAGES)
    assert used <= ALLOWED[package], f"{path} imports {used - ALLOWED[package]}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_runs_code_from_files(path):
    """No pickle under any name, no eval or exec, weights only where torch loads a file."""
    assert not {module.split(".")[0] for module in imported_modules(path)} & {
        "pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
    }
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        assert name not in ("eval", "exec", "compile", "__import__"), where
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", where
        assert keywords.get("allow_pickle", "False") == "False", where
        assert keywords.get("trust_remote_code") != "True", where  # a user's own flag may be handed on
