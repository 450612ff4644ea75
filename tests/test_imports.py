"""The layout's one rule: data flows one way, a file imports only from files to its left. Read off the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("trl_proxy", "baselines", "eval", "scripts")
# The folders and files of `trl_proxy/` from left to right: each imports only from those before it. Those of one entry
# do not import one another.
ORDER = [
    ("files", "devices", "prompts", "ranks"),
    ("reading",),
    ("core", "rewards"),
    ("decoding", "embedded"),
    ("modeling", "loading"),
    ("trainer",),
    ("runs",),
    ("__init__", "defaults", "mara"),  # `__init__` hands on the public names, the other two are former names
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
SHIPPED = [path for path in FILES if path.relative_to(ROOT).parts[0] == "trl_proxy"]
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


def place_of(module: str) -> str:
    """The entry of [`ORDER`] that a module of `trl_proxy` belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_folder_has_its_place():
    known = [name for group in ORDER for name in group]
    assert len(known) == len(set(known))
    here = {path.stem for path in (ROOT / "trl_proxy").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert here == set(known), "give the new folder its place"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "trl_proxy").rglob("*.py")), ids=lambda path: "/".join(path.parts[-2:])
)
def test_imports_go_to_the_left(path):
    place = {name: i for i, group in enumerate(ORDER) for name in group}
    mine = path.relative_to(ROOT / "trl_proxy").with_suffix("").parts[0]
    for module in imported_modules(path):
        # `from . import x` of a submodule is found under its own name; the package itself is to the right.
        if module.startswith("trl_proxy.") and (theirs := place_of(module)) != mine:
            assert place[theirs] < place[mine], f"{path.name} imports {module}, which is not to its left"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "trl_proxy").rglob("*.py")), ids=lambda path: "/".join(path.parts[-2:])
)
def test_no_file_imports_the_package_itself(path):
    """Its names are there for users; inside, a name is imported from the file that defines it."""
    found = imported_modules(path)
    assert "trl_proxy" not in found or path.name == "__main__.py", path


def test_files_of_a_folder_import_in_one_direction():
    """No circle between modules, in all packages."""
    graph = {}
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = {name for name in imported_modules(path) if name.split(".")[0] in PACKAGES} - {module}
    done = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join([*trail, module])}"
        if module not in done and module in graph:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_class_has_the_name_of_another():
    """In all packages. A metric for `evaluate` has the name of what it wraps, and the method in one file its own."""
    places: dict[str, list[str]] = {}
    for path in FILES:
        if "metrics" not in path.parts and path.name != "minimal_proxy_rlhf.py":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert not twice


def test_the_method_needs_torch_alone():
    """`trl_proxy.core` can be used by an engine that has no TRL."""
    program = (
        "import sys, trl_proxy.core.config, trl_proxy.core.gate, trl_proxy.core.features, trl_proxy.core.rollout\n"
    )
    program += "import trl_proxy.core.candidates\n"
    program += "print(*sorted({name.partition('.')[0] for name in sys.modules} & "
    program += "{'trl', 'transformers', 'peft', 'accelerate', 'datasets', 'safetensors', 'huggingface_hub'}))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == ""


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_packages_import_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    used = {module.split(".")[0] for module in imported_modules(path)} & set(PACKAGES)
    assert used <= ALLOWED[package], f"{path} imports {used - ALLOWED[package]}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_runs_code_from_files(path):
    """No pickle under any name, no eval or exec, weights only when torch loads a file."""
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
