"""The rule of imports: which folder of the package may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import speechbrain_stablequant

PACKAGE = "speechbrain_stablequant"
ROOT = Path(speechbrain_stablequant.__file__).parent

#: Every folder may also import utils.
ALLOWED = {
    "utils": set(),
    "config": set(),
    "model": {"config"},
    "core": {"model"},
    "simulation": {"core", "model"},
    "methods": {"simulation", "core", "model", "config"},
    "runtimes": {"core", "model"},
    "folder": {"runtimes", "core", "model", "config"},
    "inference": {"folder", "runtimes", "core", "model"},
    "transcribe": {"folder", "runtimes", "core", "model"},
    "export": {"folder", "runtimes", "core", "model"},
    "report": {"core", "folder"},
    "cli": {"brain", "transcribe", "export", "report", "inference"},
}
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imported(name: str, path: Path) -> Iterator[str]:
    """Modules that a module imports, inside functions and for types too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Registries name modules as "module:function".
            module, function, _ = node.value.partition(":")
            yield module
            if function:
                yield f"{package}.{module}"


def folder_of(module: str) -> str:
    """The folder, or module at the top, that a module belongs to."""
    return module.split(".")[1]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports(folder):
    found = {
        (name, target)
        for name, path in MODULES.items()
        if name != PACKAGE and folder_of(name) == folder
        for target in imported(name, path)
        if target in MODULES and target != PACKAGE
    }
    names = {folder_of(name) for name in MODULES if name != PACKAGE}
    assert folder in names, f"{folder}: there is nothing"
    allowed = ALLOWED[folder] | {folder, "utils"}
    wrong = {row for row in found if folder_of(row[1]) not in allowed}
    assert not wrong, "\n".join(" imports ".join(row) for row in sorted(wrong))
