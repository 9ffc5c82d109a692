"""Each lint rule fires on a kernel that breaks it, and only there."""

import pytest

import lint

CLEAN = """
import nki
import nki.isa as nisa
import nki.language as nl

LIMIT = 128


class Shape(nl.NKIObject):
    rows: int = 1


def helper(t, value=None):
    assert t.shape[0] <= LIMIT, f"too many partitions: {t.shape[0]}"
    return value if value != None else 1.0


@nki.jit
def kernel(x, flag=False, tiles=(1, 2)):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    shape = Shape(rows=x.shape[0])
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    names = []
    for i in range(2):
        names.append(i)
        if i > shape.rows:
            break
    nisa.dma_copy(dst=tile, src=x)
    helper(tile)

    def body(register):
        nisa.dma_copy(dst=tile, src=x)

    nl.fori_loop(0, 2, body)
    nisa.dma_copy(dst=out, src=tile)
    return out


def not_a_kernel(values):
    return [v for v in values if v is not None]
"""


def rules(source):
    return {f.rule for f in lint.lint_source(source)}


def in_kernel(statement):
    """The clean file with one more statement at the start of the kernel."""
    lines = statement.splitlines()
    body = "".join(f"    {line}\n" for line in lines)
    marker = "    out = nl.ndarray(x.shape"
    return CLEAN.replace(marker, body + marker, 1)


def test_a_clean_kernel_has_no_findings():
    assert lint.lint_source(CLEAN) == []


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        ("a = x is None", "is"),
        ("a = x is not None", "is"),
        ("a = lambda v: v", "lambda"),
        ("a = [v for v in tiles]", "comprehension"),
        ("a = {v: v for v in tiles}", "comprehension"),
        ("a = sum(v for v in tiles)", "generator"),
        ("yield x", "generator"),
        ("try:\n    a = 1\nexcept ValueError:\n    a = 2", "try"),
        ("raise ValueError('x')", "raise"),
        ("global LIMIT", "global"),
        ("import math", "local-import"),
        ("del x", "del"),
        ("a = (b := 1)", "walrus"),
        ("def inner():\n    return 1", "nested-function"),
        ("for i in range(3):\n    a = i\nelse:\n    a = 0", "loop-else"),
        ("match flag:\n    case True:\n        a = 1", "match"),
        ("helper(*tiles)", "star"),
        ("helper(**tiles)", "star"),
        ("a = x @ x", "operator"),
        ("for i in nl.affine_range(2):\n    a = i", "deprecated-loop"),
        ("a = nl.arange(3)", "removed"),
        ("a = nl.divide(x, x)", "fails-on-device"),
        ("a = nl.matmul(x, x)", "fails-on-device"),
        ("a = nl.ndarray((1, 1), dtype=nl.float32, buffer='sbuf')", "string-buffer"),
        ("nisa.tensor_copy(dst=x, src=x, engine=1)", "raw-enum"),
        ("nisa.tensor_copy(dst=x, src=x, mask=x)", "removed"),
        ("nisa.tensor_tensor(x, x, x, nl.add)", "keywords"),
    ],
)
def test_each_rule_fires_in_a_kernel(statement, rule):
    findings = lint.lint_source(in_kernel(statement))
    assert {f.rule for f in findings} == {rule}
    first = in_kernel(statement).splitlines().index("    " + statement.splitlines()[0]) + 1
    assert first <= findings[0].line < first + len(statement.splitlines()) + 1


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("import nki\n", "import neuronxcc.nki as nki\n", "import"),
        ("def helper(t, value=None)", "def helper(t, *, value=None)", "signature"),
        ("tiles=(1, 2)", "tiles=[1, 2]", "list-argument"),
        ("class Shape(nl.NKIObject)", "class Shape", "class-base"),
        ("LIMIT = 128", "LIMIT = [128]", "mutable-global"),
        ("if value != None", "if value is not None", "is"),
    ],
)
def test_each_rule_fires_on_what_a_kernel_reaches(old, new, rule):
    assert old in CLEAN
    assert rules(CLEAN.replace(old, new, 1)) == {rule}


def test_syntax_errors_are_findings():
    assert rules("def f(:\n") == {"syntax"}


def test_the_command_reports_and_exits_1(tmp_path, capsys):
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(CLEAN)
    bad.write_text(in_kernel("a = x is None"))
    assert lint.main([str(good)]) == 0
    assert lint.main([str(good), str(bad)]) == 1
    assert "bad.py" in capsys.readouterr().out
