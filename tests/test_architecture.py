"""The architecture, kept by tests: imports go down only, and the machinery names no method."""

import ast
from functools import cache
from pathlib import Path

import pytest

import prune_cli
from prune_cli.compose import CONF

PACKAGE = Path(prune_cli.__file__).parent
# From top to bottom: a module may import what stands on a later line, or beside it.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["commands"],
    ["sweep"],
    ["rows"],
    ["compose"],
    ["job"],
    ["build"],
    ["pipeline"],
    ["stages"],
    ["workshop"],
    ["base", "repeated"],
    ["methods"],
    ["experiment"],
    ["filters", "soft", "budget", "distillation"],
    ["trainer"],
    ["method"],
    ["prunable"],
    ["surgery"],
    ["trial"],
    ["verify"],
    ["cutting"],
    ["store", "journal", "report", "checkpoint", "metrics"],
    ["inference", "streams", "folding"],
    ["grouping"],
    ["tracing"],
    ["record", "pictures", "selection", "criteria", "channels", "hooks"],
    ["tracking", "slicing"],
    ["models"],
    ["masks", "layers", "datasets", "foreign", "plain"],
    ["weight_files", "weight_names"],
    ["kernels"],
    ["published"],
    ["environment", "external_files", "precision", "seeding", "targets", "structure", "timing", "user_code", "vision"],
    ["modules"],
    ["settings", "evaluation"],
    ["errors"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


@cache
def _sources() -> dict[str, ast.Module]:
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def _imports(tree: ast.Module):
    """Imported modules, with whether the import runs when the module is imported."""
    lazy = {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "prune_cli" else [node.module]
            yield from ((name, node not in lazy) for name in names)


def _part(module: str) -> str:
    """prune_cli.methods.fp -> methods; the package itself -> "" """
    return (module.split(".") + [""])[1]


@pytest.mark.parametrize("source", sorted(_sources()))
def test_imports_go_down_only(source):
    part = source.split("/")[0].removesuffix(".py")
    if part == "__init__":
        return
    assert part in RANK, f"{source}: give {part} its place in LAYERS"
    for module, at_import in _imports(_sources()[source]):
        if module.startswith("prune_cli.") and at_import:
            imported = _part(module)
            assert imported == part or RANK[imported] > RANK[part], f"{source} imports {module}"


def test_nobody_imports_a_method():
    for source, tree in _sources().items():
        if not source.startswith("methods/"):
            assert not any(_part(module) == "methods" for module, _ in _imports(tree)), source


@pytest.mark.parametrize(("package", "importer"), [("torch_pruning", "tracing.py"), ("torchvision", "vision.py")])
def test_a_library_behind_one_module_has_one_importer(package, importer):
    found = {s for s, tree in _sources().items() for module, _ in _imports(tree) if module.split(".")[0] == package}
    assert found <= {importer}


@pytest.mark.parametrize("package", ["hydra", "omegaconf"])
def test_only_the_entry_knows_hydra(package):
    found = {s for s, tree in _sources().items() for module, _ in _imports(tree) if module.split(".")[0] == package}
    assert found <= {"cli.py", "compose.py", "sweep.py", "job.py"}


@pytest.mark.parametrize("source", ["record.py", "errors.py", "settings.py", *(f"report/{p.name}" for p in (PACKAGE / "report").glob("*.py"))])
def test_reports_import_no_torch(source):
    assert not any(module.split(".")[0] == "torch" for module, _ in _imports(_sources()[source]))


@pytest.mark.parametrize("source", ["pipeline.py", "stages.py", "base.py", "trainer.py"])
def test_the_machinery_names_no_method_and_tests_no_type(source):
    tree = _sources()[source]
    names = {path.stem for path in (CONF / "method").glob("*.yaml")} - {"random"}
    classes = {
        node.name for path in (PACKAGE / "methods").glob("*.py") for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in names, f"{source}:{node.lineno} names the method {node.value}"
        if isinstance(node, ast.Name):
            assert node.id not in classes, f"{source}:{node.lineno} names {node.id}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass", "type"):
            tested = ast.unparse(node)
            assert "method" not in tested and "hooks" not in tested, f"{source}:{node.lineno} tests a type: {tested}"


def test_no_folder_for_leftovers():
    names = {path.stem for path in PACKAGE.rglob("*")}
    assert not names & {"utils", "helpers", "common", "misc"}


def test_a_method_file_is_short():
    for path in (PACKAGE / "methods").glob("*.py"):
        assert path.read_text().count("\n") <= 150, path
