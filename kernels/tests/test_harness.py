"""What the kernel tests rest on: a mutant that proves nothing fails loudly."""

import harness
import pytest


def dies(old: str, new: str):
    return harness.killed("kv_append", (old, new), lambda module: module.kv_append is None)


def test_a_mutation_that_does_not_apply_is_an_error():
    with pytest.raises(ValueError, match="occurs 0 times"):
        dies("no such line", "")


def test_a_mutant_that_python_cannot_run_is_an_error():
    with pytest.raises(NameError):
        dies("P_MAX = 128", "P_MAX = no_such_name")
    with pytest.raises(SyntaxError):
        dies("P_MAX = 128", "P_MAX = ")


def test_a_check_that_is_false_and_one_that_raises_kill():
    assert dies("P_MAX = 128", "P_MAX = 64") == "numerics"

    def refuses(module):
        raise AssertionError(module.P_MAX)

    assert harness.killed("kv_append", ("P_MAX = 128", "P_MAX = 64"), refuses) == "AssertionError"
