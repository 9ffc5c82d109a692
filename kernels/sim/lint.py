"""Check that kernels stay inside the Python subset that the NKI compiler accepts.

    python kernels/sim/lint.py kernels/*.py

The compiler is stricter than Python, and a simulator that merely runs the function does not notice. Checked are the
bodies of `@nki.jit` kernels and of every function and class of the same file that they reach (called by name, or as a
method of an NKIObject). Rules come from the NKI language guide and migration guide; constructs that AWS's own kernels
never use are refused too. Exit status 1 if anything is found.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import sys

_BUFFERS = {"sbuf", "psum", "hbm", "shared_hbm", "private_hbm"}
_LOOP_CALLS = {"fori_loop", "while_loop"}
_REMOVED = {
    "arange": "index tiles are gone; use slices or ap",
    "mgrid": "index tiles are gone; use slices or ap",
    "par_dim": "axis 0 is the partition axis",
    "tensor_copy_dynamic_src": "use tensor_copy with ap(scalar_offset=...)",
    "tensor_copy_dynamic_dst": "use tensor_copy with ap(scalar_offset=...)",
    "atomic_rmw": "use dma_compute",
}
_DEPRECATED_LOOPS = {"affine_range", "sequential_range", "static_range", "dynamic_range"}
_FAILING = {"divide", "mod"}
_ENUM_KEYWORDS = {"engine", "reduce_cmd", "dge_mode", "oob_mode", "perf_mode"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One violation: where, which rule, and what to do."""

    path: str
    line: int
    rule: str
    message: str

    def __str__(self):
        return f"{self.path}:{self.line}: {self.rule}: {self.message}"


def lint_file(path) -> list[Finding]:
    """Findings of one file."""
    return lint_source(pathlib.Path(path).read_text(), str(path))


def lint_source(source: str, path: str = "<source>") -> list[Finding]:
    """Findings of source text, by line."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [Finding(path, error.lineno or 0, "syntax", str(error.msg))]
    module = _Module(tree)
    checker = _Checker(path, module)
    for node in ast.walk(tree):
        checker.imports(node)
    for fn in module.kernels:
        checker.signature(fn, entry=True)
    for definition in module.reachable():
        checker.definition(definition)
    return sorted(set(checker.findings), key=lambda f: (f.line, f.rule))


def _dotted(node) -> str:
    """a.b.c of a name or attribute chain, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


class _Module:
    """Top-level definitions of a file, its kernels, and what they reach."""

    def __init__(self, tree: ast.Module):
        self.functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        self.classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        self.globals = self._mutable_globals(tree)
        self.kernels = [f for f in self.functions.values() if any(_is_jit(d) for d in f.decorator_list)]

    @staticmethod
    def _mutable_globals(tree: ast.Module) -> set[str]:
        names = set()
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, (ast.List, ast.Dict, ast.Set)):
                names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        return names

    def reachable(self) -> list[ast.AST]:
        """Kernels and the functions and classes of this file that they mention, transitively."""
        queue, seen = list(self.kernels), []
        while queue:
            definition = queue.pop()
            if definition in seen:
                continue
            seen.append(definition)
            for node in ast.walk(definition):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    queue += [d for d in (self.functions.get(node.id), self.classes.get(node.id)) if d is not None]
        return seen


def _is_jit(decorator) -> bool:
    node = decorator.func if isinstance(decorator, ast.Call) else decorator
    return _dotted(node) in ("nki.jit", "jit")


class _Checker:
    """Walks definitions and collects findings."""

    def __init__(self, path: str, module: _Module):
        self.path = path
        self.module = module
        self.findings: list[Finding] = []

    def report(self, node, rule: str, message: str) -> None:
        """Add a finding at a node."""
        self.findings.append(Finding(self.path, getattr(node, "lineno", 0), rule, message))

    def imports(self, node) -> None:
        """Imports that no longer exist."""
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            return
        for name in names:
            if name.split(".")[0] == "neuronxcc":
                self.report(node, "import", f"{name}: a compile error since NKI 0.4; import nki")

    def signature(self, fn: ast.FunctionDef, entry: bool) -> None:
        """Parameters of a kernel or helper."""
        a = fn.args
        if a.kwonlyargs or a.vararg or a.kwarg or a.posonlyargs:
            self.report(fn, "signature", f"{fn.name}: plain parameters only (no *, /, *args, **kwargs)")
        for default in a.defaults if entry else []:
            if isinstance(default, (ast.List, ast.Dict, ast.Set)):
                self.report(default, "list-argument", f"{fn.name}: kernel arguments are tuples, not lists or dicts")

    def definition(self, node) -> None:
        """A reached function or class."""
        if isinstance(node, ast.ClassDef):
            self._class(node)
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    self._function(item)
        else:
            self._function(node)

    def _class(self, node: ast.ClassDef) -> None:
        bases = [_dotted(b).split(".")[-1] for b in node.bases]
        local = [b for b in bases if b in self.module.classes]
        if not local and not any(b in ("NKIObject", "Enum", "IntEnum") for b in bases):
            self.report(node, "class-base", f"class {node.name} must inherit from nl.NKIObject or Enum")

    def _function(self, fn: ast.FunctionDef) -> None:
        self.signature(fn, entry=False)
        if isinstance(fn, ast.AsyncFunctionDef):
            self.report(fn, "async", f"{fn.name}: async functions do not compile")
        loop_bodies = _loop_bodies(fn)
        for node in ast.walk(fn):
            if node is fn:
                continue
            if isinstance(node, ast.FunctionDef) and node.name not in loop_bodies:
                self.report(
                    node,
                    "nested-function",
                    f"{node.name}: nested functions are for fori_loop and while_loop bodies only",
                )
            self._statement(node)
            self._expression(node)
            if isinstance(node, ast.Call):
                self._call(node)

    def _statement(self, node) -> None:
        if isinstance(node, (ast.Try, getattr(ast, "TryStar", ast.Try))):
            self.report(node, "try", "exceptions do not compile; use assert")
        elif isinstance(node, ast.Raise):
            self.report(node, "raise", "exceptions do not compile; use assert")
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            self.report(node, "global", "a kernel is cached by its arguments and may not touch outer state")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            self.report(node, "local-import", "import at the top of the file")
        elif isinstance(node, ast.Delete):
            self.report(node, "del", "del does not compile")
        elif isinstance(node, (ast.AsyncFor, ast.AsyncWith, ast.Await)):
            self.report(node, "async", "async does not compile")
        elif isinstance(node, ast.Match):
            self.report(node, "match", "use if and elif")
        elif isinstance(node, (ast.For, ast.While)) and node.orelse:
            self.report(node, "loop-else", "else on a loop does not compile")

    def _expression(self, node) -> None:
        if isinstance(node, ast.Compare) and any(isinstance(o, (ast.Is, ast.IsNot)) for o in node.ops):
            self.report(node, "is", "`is` and `is not` do not compile; write == None or != None")
        elif isinstance(node, ast.Lambda):
            self.report(node, "lambda", "lambda does not compile")
        elif isinstance(node, (ast.Yield, ast.YieldFrom, ast.GeneratorExp)):
            self.report(node, "generator", "generators do not compile")
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp)):
            self.report(node, "comprehension", "comprehensions do not compile; write the loop")
        elif isinstance(node, ast.NamedExpr):
            self.report(node, "walrus", ":= does not compile")
        elif isinstance(node, ast.Starred) and isinstance(node.ctx, ast.Load):
            self.report(node, "star", "argument unpacking does not compile")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            self.report(node, "operator", "tensors have no operators; use nisa.nc_matmul")
        elif isinstance(node, ast.Name) and node.id in self.module.globals and isinstance(node.ctx, ast.Load):
            self.report(node, "mutable-global", f"{node.id}: a kernel may not depend on mutable globals")

    def _call(self, node: ast.Call) -> None:
        name = _dotted(node.func)
        last = name.split(".")[-1]
        qualified = name.startswith(("nl.", "nisa.", "nki."))
        if any(k.arg is None for k in node.keywords):
            self.report(node, "star", "argument unpacking does not compile")
        if qualified and last in _REMOVED:
            self.report(node, "removed", f"{name}: {_REMOVED[last]}")
        if name.startswith("nl.") and last in _DEPRECATED_LOOPS:
            self.report(
                node, "deprecated-loop", f"{name}: use range" + (", nl.fori_loop" if last == "dynamic_range" else "")
            )
        if name.startswith("nl.") and last in _FAILING:
            self.report(node, "fails-on-device", f"{name} simulates but does not compile for hardware")
        if name == "nl.matmul" and not any(k.arg == "transpose_x" and _true(k.value) for k in node.keywords):
            self.report(node, "fails-on-device", "nl.matmul compiles only with transpose_x=True")
        for k in node.keywords:
            self._keyword(k, qualified)
        if (
            name.startswith("nisa.")
            and node.args
            and last not in ("register_alloc",)
            and not node.keywords
            and len(node.args) > 2
        ):
            self.report(node, "keywords", f"{name}: pass operands by keyword")

    def _keyword(self, k: ast.keyword, qualified: bool) -> None:
        if not qualified:
            return
        value = k.value
        if k.arg == "buffer" and isinstance(value, ast.Constant) and value.value in _BUFFERS:
            self.report(value, "string-buffer", f"buffer={value.value!r}: pass nl.{value.value}")
        if k.arg in _ENUM_KEYWORDS and isinstance(value, ast.Constant) and value.value is not None:
            self.report(value, "raw-enum", f"{k.arg}={value.value!r}: pass a member of the enum")
        if k.arg == "mask":
            self.report(value, "removed", "mask= was removed; slice the operands")


def _true(node) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _loop_bodies(fn) -> set[str]:
    """Names of nested functions passed to fori_loop or while_loop."""
    names = set()
    for node in ast.walk(fn):
        if isinstance(node, ast.Call) and _dotted(node.func).split(".")[-1] in _LOOP_CALLS:
            names |= {a.id for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Name)}
    return names


def main(paths: list[str]) -> int:
    """Lint files; print findings; 1 if there are any."""
    findings = [f for path in paths for f in lint_file(path)]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
