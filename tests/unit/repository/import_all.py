"""`import_all.py ENTRY OPTIONAL ...`: import what a service may import, in an environment that holds nothing else.

That is its entry point, all modules of its package, and what the modules of this project that it has loaded import
inside their functions. Prints each import that fails. A name in OPTIONAL may fail inside a function: its extra is not
installed. If it is of this project, the function has asked for the extra before. Runs without site-packages: PYTHONPATH
has the environment.
"""

import ast
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

OWN = "penstock"
OTHER_ENVIRONMENT = ".inside"  # runs in SGLang's Python


def main(entry: str, optional: list[str]) -> int:
    """The exit code: 1 if an import failed."""
    importlib.import_module(entry)
    package = sys.modules[entry.partition(".")[0]]
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}."):
        if OTHER_ENVIRONMENT in module.name or not package.__name__.startswith(OWN):
            continue
        if not _is_in(module.name, optional):
            importlib.import_module(module.name)
    failed = 0
    for name, path in sorted(_own_modules()):
        for wanted, part in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            if _is_in(wanted, optional):
                continue
            try:
                _import(wanted, part)
            except ImportError as error:
                print(f"{name}: {error}")
                failed = 1
    return failed


def _is_in(name: str, optional: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{each}.") for each in optional)


def _own_modules() -> list[tuple[str, Path]]:
    return [
        (name, Path(path))
        for name, module in sys.modules.items()
        if name.startswith(OWN) and (path := getattr(module, "__file__", None))
    ]


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name in it or nothing) of each import that can be executed: those for type checkers cannot."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((each.name, "") for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", each.name) for each in node.names)
        yield from _imports(node)


def _import(module: str, part: str) -> None:
    found = importlib.import_module(module)
    if part and not hasattr(found, part):
        importlib.import_module(f"{module}.{part}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
