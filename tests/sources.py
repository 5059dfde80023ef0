"""Reads what our modules import and name, from their text alone: nothing of ours is executed.

`uses` sees imports at every depth (functions, `TYPE_CHECKING`), `import_module("literal")`, and dotted names whose
first part an import bound, with aliases resolved: `npr.seed` after `from numpy import random as npr` is
`numpy.random.seed`. What hides behind a variable (`r = np.random`) shows as the bare name that was assigned.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("clients", "fedml_core", "server", "simulations", "strategies")
LOADERS = frozenset({"import_module", "__import__", "run_module"})
RISKY_BUILTINS = frozenset({"eval", "exec"})


@dataclass(frozen=True)
class Use:
    """One place where a file imports or names something: `target` is dotted and absolute."""

    file: str
    line: int
    target: str
    is_import: bool
    typing_only: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {'imports' if self.is_import else 'uses'} {self.target}"

    def within(self, prefix: str) -> bool:
        """Say whether the target is `prefix` or lies below it."""
        return self.target == prefix or self.target.startswith(prefix + ".")


@dataclass(frozen=True)
class Call:
    """One call: `function` is dotted and absolute, or `.method` where the object is not known."""

    file: str
    line: int
    function: str
    keywords: frozenset[str]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} calls {self.function}"


def our_files() -> dict[str, str]:
    """Return the text of every source file and stub of the five packages, by its path from the root."""
    found = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py*")))
    texts = (path for path in found if path.suffix in (".py", ".pyi"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in texts}


def uses_of(files: Mapping[str, str]) -> list[Use]:
    """Return all uses in `files`, in order of file and line."""
    return [use for file, text in files.items() for use in sorted(uses(file, text), key=lambda use: use.line)]


def uses(file: str, text: str) -> Iterator[Use]:
    """Yield what `file` imports and names."""
    tree = ast.parse(text, file)
    package = ".".join(PurePosixPath(file).parent.parts)
    typing_lines = _typing_lines(tree)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target, bound, meaning in _imported(node, package):
                names[bound] = meaning
                yield Use(file, node.lineno, target, True, node.lineno in typing_lines)
        elif isinstance(node, ast.Call) and (loaded := _loaded(node, package)):
            yield Use(file, node.lineno, loaded, True)
    yield from _named(file, tree, names)


def calls_of(files: Mapping[str, str]) -> list[Call]:
    """Return all calls in `files`, in order of file and line."""
    return [call for file, text in files.items() for call in sorted(calls(file, text), key=lambda call: call.line)]


def calls(file: str, text: str) -> Iterator[Call]:
    """Yield the calls of `file` whose function is a name that an import bound, or a method of anything."""
    tree = ast.parse(text, file)
    package = ".".join(PurePosixPath(file).parent.parts)
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    names = {bound: meaning for node in imports for _, bound, meaning in _imported(node, package)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = _dotted(node.func, names)
            if function is None and isinstance(node.func, ast.Attribute):
                function = f".{node.func.attr}"
            if function is not None:
                keywords = frozenset(keyword.arg or "**" for keyword in node.keywords)
                yield Call(file, node.lineno, function, keywords)


def _imported(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, str, str]]:
    """Yield (what is imported, the name that it binds, what that name means)."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            first = alias.name.split(".")[0]
            yield alias.name, alias.asname or first, alias.name if alias.asname else first
        return
    base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
    for alias in node.names:
        target = f"{base}.{alias.name}"
        yield target, alias.asname or alias.name, target


def _loaded(call: ast.Call, package: str) -> str | None:
    """Return the module that a call such as `importlib.import_module("server.round")` loads, if it is a literal."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg in ("name", "mod_name"))]
    if name not in LOADERS or not given:
        return None
    literal = given[0].value if isinstance(given[0], ast.Constant) else None
    if not isinstance(literal, str):
        return None
    return resolve_name(literal, package) if literal.startswith(".") else literal


def _typing_lines(tree: ast.AST) -> frozenset[int]:
    """Return the lines that only a type checker executes."""
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If))
    typing = (node for node in blocks if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"))
    spans = ((part.lineno, part.end_lineno or part.lineno) for node in typing for part in node.body)
    return frozenset(line for first, last in spans for line in range(first, last + 1))


def _named(file: str, tree: ast.AST, names: Mapping[str, str]) -> Iterator[Use]:
    """Yield each longest dotted name that starts at an import, and each risky builtin."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name | ast.Attribute) and (dotted := _dotted(node, names)):
            yield Use(file, node.lineno, dotted, False)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def _dotted(node: ast.AST, names: Mapping[str, str]) -> str | None:
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else None
    if isinstance(node, ast.Name):
        return names.get(node.id) or (f"builtins.{node.id}" if node.id in RISKY_BUILTINS else None)
    return None
