"""The rules of the house that no linter expresses. Each takes one source and returns what breaks it, one sentence a finding."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import PurePath

from house_tree import Source

Rule = Callable[[Source], list[str]]

MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 60
#: A public method this long says in a docstring what it does; a shorter one may let its name speak.
MAX_SILENT_METHOD_LINES = 15
_WORDS = ("utils", "util", "common", "helpers", "helper", "misc", "manager", "handler", "data", "info", "base", "core")
#: Words that a class name may not even contain.
_CLASS_WORDS = {"Manager", "Handler", "Helper", "Helpers", "Utils", "Util", "Misc"}
_PORT = re.compile(r"Implements `|See `tensorway\.")
_BROAD = {"Exception", "BaseException"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def short_module(source: Source) -> list[str]:
    """A module is one noun under 300 lines."""
    num_lines = len(source.text.splitlines())
    return [f"{num_lines} lines, more than {MAX_MODULE_LINES}"] if num_lines > MAX_MODULE_LINES else []


def short_functions(source: Source) -> list[str]:
    """A function is one thought."""
    return [
        f"line {function.lineno}: {function.name} has {lines} lines, more than {MAX_FUNCTION_LINES}"
        for function in _functions(source.tree)
        if (lines := _num_lines(function)) > MAX_FUNCTION_LINES
    ]


def telling_names(source: Source) -> list[str]:
    """No module or class is called utils, common, helpers, …"""
    path = PurePath(source.path)
    found = [f"the name {part!r} says nothing" for part in (*path.parent.parts, path.stem) if part in _WORDS]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef):
            words = re.findall(r"[A-Z][a-z0-9]*|[A-Z]+", node.name)
            if node.name.strip("_").lower() in _WORDS or _CLASS_WORDS.intersection(words):
                found.append(f"line {node.lineno}: class {node.name} says nothing")
    return found


def documented(source: Source) -> list[str]:
    """Every public module, class and function has a docstring, and every public method that is not short."""
    found = [] if ast.get_docstring(source.tree) else ["the module has no docstring"]
    # `main` does what its module's docstring says.
    found += [
        f"line {node.lineno}: {node.name} has no docstring"
        for node in source.tree.body
        if isinstance(node, Function | ast.ClassDef) and _is_public(node.name) and node.name != "main" and not ast.get_docstring(node)
    ]
    for kind in source.tree.body:
        # What implements a port is documented by the port.
        if isinstance(kind, ast.ClassDef) and _is_public(kind.name) and not _PORT.search(ast.get_docstring(kind) or ""):
            found += [
                f"line {node.lineno}: {kind.name}.{node.name} has {_num_lines(node)} lines and no docstring"
                for node in kind.body
                if isinstance(node, Function) and _is_public(node.name)
                and _num_lines(node) > MAX_SILENT_METHOD_LINES and not ast.get_docstring(node)
            ]
    return found


def no_finalisers(source: Source) -> list[str]:
    """What must be closed is closed by its owner."""
    return [f"line {function.lineno}: defines __del__" for function in _functions(source.tree) if function.name == "__del__"]


def no_swallowed_errors(source: Source) -> list[str]:
    """Whoever catches everything says, does or raises something."""
    found: list[str] = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or _is_broad(node.type)):
            if node.type is None:
                found.append(f"line {node.lineno}: a bare except")
            elif not any(isinstance(child, ast.Raise | ast.Call) for statement in node.body for child in ast.walk(statement)):
                found.append(f"line {node.lineno}: catches everything and drops it")
    return found


def unowned_tasks(source: Source) -> list[tuple[str, int]]:
    """Where a task is made outside of a TaskGroup: the enclosing function's name, and the line."""
    found: list[tuple[str, int]] = []
    for scope, call in _calls(source.tree, ""):
        name = ast.unparse(call.func)
        is_loops = name.endswith(".create_task") and "loop" in name.rpartition(".")[0]
        if name in ("asyncio.create_task", "create_task", "asyncio.ensure_future", "ensure_future") or is_loops:
            found.append((scope, call.lineno))
    return found


def ends_tasks(source: Source, scope: str) -> bool:
    """Whether the function named `scope` cancels or awaits something that it or another has begun."""
    return any(
        function.name == scope and any(_ends_task(node) for node in ast.walk(function)) for function in _functions(source.tree)
    )


def reads_environment(source: Source) -> bool:
    """Whether the module reads or writes environment variables."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os" and any(alias.name in ("environ", "getenv") for alias in node.names):
            return True
    return False


def imports(source: Source, module: str) -> bool:
    """Whether the source imports `module` or something of it, anywhere."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import) and any(_is_within(alias.name, module) for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and node.module is not None and any(
            _is_within(f"{node.module}.{alias.name}", module) for alias in node.names
        ):
            return True
    return False


def _ends_task(node: ast.AST) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "cancel") or (isinstance(node, ast.Await) and isinstance(node.value, ast.Name))


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _calls(node: ast.AST, scope: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the name of the innermost function around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield scope, child
        yield from _calls(child, child.name if isinstance(child, Function) else scope)


def _num_lines(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _is_broad(kind: ast.expr) -> bool:
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(name, ast.Name) and name.id in _BROAD for name in names)
