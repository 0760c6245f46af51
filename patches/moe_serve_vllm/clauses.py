"""What a vLLM can be asked for, by reading its source."""

from __future__ import annotations

import ast
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Called:
    """A function we call: it takes our arguments and asks for no others."""

    file: str
    name: str
    arguments: tuple[str, ...] = ()

    def difference(self, tree: ast.Module) -> str | None:
        """What changed, in words."""
        function = _function(tree, self.name)
        if function is None:
            return f"{self.name} is gone"
        taken, required = _parameters(function)
        if lacking := [a for a in self.arguments if a not in taken]:
            return f"{self.name} takes no {', '.join(lacking)}"
        if more := [a for a in required if a not in self.arguments]:
            return f"{self.name} also requires {', '.join(more)}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Overridden:
    """A method we override: its parameters are exactly those we hand on."""

    file: str
    name: str
    parameters: tuple[str, ...]

    def difference(self, tree: ast.Module) -> str | None:
        """What changed, in words."""
        function = _function(tree, self.name)
        if function is None:
            return f"{self.name} is gone"
        taken, _ = _parameters(function)
        if tuple(taken) != self.parameters:
            return f"{self.name} takes ({', '.join(taken)}), not ({', '.join(self.parameters)})"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Holds:
    """Names that a class (or, without one, the module) defines."""

    file: str
    name: str = ""
    members: tuple[str, ...] = ()

    def difference(self, tree: ast.Module) -> str | None:
        """What changed, in words."""
        scope = _scope(tree, self.name)
        if scope is None:
            return f"{self.name} is gone"
        there = _defined(scope)
        if lacking := [m for m in self.members if m not in there]:
            return f"{self.name or self.file} has no {', '.join(lacking)}"
        return None


Clause = Called | Overridden | Holds


def _scope(tree: ast.Module, name: str) -> ast.Module | ast.ClassDef | None:
    if not name:
        return tree
    return next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)


def _function(tree: ast.Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """A function or method; of overloads the last, and where absent that of a base class here."""
    owner, _, last = name.rpartition(".")
    scope = _scope(tree, owner)
    if scope is None:
        return None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    here = [n for n in scope.body if isinstance(n, kinds) and n.name == last]
    if here:
        return here[-1]
    bases = scope.bases if isinstance(scope, ast.ClassDef) else []
    inherited = (_function(tree, f"{b.id}.{last}") for b in bases if isinstance(b, ast.Name))
    return next((function for function in inherited if function is not None), None)


def _parameters(
    function: ast.FunctionDef | ast.AsyncFunctionDef,
) -> tuple[list[str], list[str]]:
    """All parameters but ``self`` and ``cls``, and those without a default."""
    arguments = function.args
    places = [*arguments.posonlyargs, *arguments.args]
    bare = places[: len(places) - len(arguments.defaults)]
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required = [*bare, *(a for a, default in keywords if default is None)]
    all_of_them = [*places, *arguments.kwonlyargs]
    return (
        [a.arg for a in all_of_them if a.arg not in ("self", "cls")],
        [a.arg for a in required if a.arg not in ("self", "cls")],
    )


def _defined(scope: ast.Module | ast.ClassDef) -> set[str]:
    """Names a class or module defines: functions, what is assigned or registered."""
    names: set[str] = set()
    for node in ast.walk(scope):
        match node:
            case ast.FunctionDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.Call(
                func=ast.Attribute(attr="register_buffer" | "register_parameter"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names.add(name)
    return names
