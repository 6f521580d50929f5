"""What a name `module:attribute` of users' code leads to, as far as the source says it: nothing is imported or run.

Owns the look at the source. Invariant: a name is refused only if its import is certain to fail. Whatever the source
does not decide (a name made at run time, `import *`, a module in C) counts as there.
"""

import ast
import difflib
import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from itertools import islice
from pathlib import Path

MOST_BYTES = 2**20  # of a source that is read
MOST_MODULES = 100  # of a folder that are read for a hint
AT_RUN_TIME = frozenset({"globals", "locals", "vars", "exec", "eval", "setattr", "modules", "__dict__", "__getattr__"})
"""Names whose use in a module may bind others."""
UNKNOWN = Path()


def why_absent(name: str, folder: str) -> str:
    """Why `module:attribute` cannot be imported with `folder` first on the path; "" if it can, or nobody knows."""
    module, _, attribute = name.partition(":")
    path = _source_of(module, folder)
    if path is None:
        return f"ModuleNotFoundError: No module named {module!r}{_hint(name, functions_in(folder))}"
    if path.suffix != ".py":
        return ""
    try:
        tree = _parsed(path)
    except SyntaxError as error:
        return f"{type(error).__name__}: {error.msg} ({path.name}:{error.lineno})"
    except (OSError, ValueError, RecursionError, MemoryError):
        return ""
    bound = _bound(tree)
    first = attribute.partition(".")[0]
    if bound is None or first in bound:
        return ""
    there = [f"{module}:{each}" for each in _functions(tree)]
    return f"AttributeError: module {module!r} has no attribute {first!r}{_hint(name, there)}"


def functions_in(folder: str) -> list[str]:
    """`module:name` for each function and class of the modules that lie in a folder."""
    found = []
    for path in islice(sorted(Path(folder).glob("*.py")), MOST_MODULES):
        try:
            found += [f"{path.stem}:{each}" for each in _functions(_parsed(path))]
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return found


def nearest(name: str, there: Iterable[str]) -> str:
    """The name that was meant: the same function or module otherwise written, or one that is alike; "" if none is."""
    names = list(there)
    module, _, attribute = name.rpartition(":")
    module = module.removesuffix(".py").replace("/", ".")
    same = [each for each in names if each.partition(":")[2] == attribute]
    return next(iter([*_close(f"{module}:{attribute}", same or names), *(same[:1])]), "")


def _close(name: str, there: list[str]) -> list[str]:
    return difflib.get_close_matches(name, there, n=1, cutoff=0.7)


def _hint(name: str, there: list[str]) -> str:
    near = nearest(name, there)
    return f"; did you mean {near!r}?" if near else ""


def _source_of(module: str, folder: str) -> Path | None:
    """The file of a module, UNKNOWN if it has none; None if there is no such module."""
    first, *others = module.split(".")
    try:
        spec = PathFinder.find_spec(first, [folder]) or importlib.util.find_spec(first)
        for number, _ in enumerate(others, start=2):
            if spec is None or spec.submodule_search_locations is None:
                return None
            name = ".".join([first, *others][:number])
            spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    except (ImportError, ValueError, OSError):
        return UNKNOWN  # a finder of somebody else's failed
    return None if spec is None else _file_of(spec)


def _file_of(spec: ModuleSpec) -> Path:
    return Path(spec.origin) if spec.origin and spec.has_location else UNKNOWN


def _parsed(path: Path) -> ast.Module:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} is too long")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the user's source: its import shows them
        return ast.parse(path.read_bytes(), str(path))


def _bound(tree: ast.Module) -> set[str] | None:
    """The names that a module may bind; None if the source does not decide it."""
    found = {"__doc__", "__name__", "__file__"}
    for node in _own_nodes(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Import() | ast.ImportFrom():
                if any(each.name == "*" for each in node.names):
                    return None
                found.update(each.asname or each.name.partition(".")[0] for each in node.names)
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                found.add(name)
    everywhere = list(ast.walk(tree))
    used = {node.id for node in everywhere if isinstance(node, ast.Name)}
    used |= {node.attr for node in everywhere if isinstance(node, ast.Attribute)}
    if (used | found) & AT_RUN_TIME:
        return None
    return found.union(*(node.names for node in everywhere if isinstance(node, ast.Global)))


def _own_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of the module's own scope: not those within its functions and classes."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _functions(tree: ast.Module) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
