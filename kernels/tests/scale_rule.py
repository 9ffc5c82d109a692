"""The two documented block scales of quantize_mx, as a switch around a launch."""

import contextlib

import pytest

import harness

RULES = ("neuron", "ocp")


@contextlib.contextmanager
def scale_rule(rule: str):
    """`neuron` (NKI 0.5 and later) or `ocp` (older goldens). The official simulator has only the newer one."""
    if harness.backend.backend()[0] != "sim":
        if rule != "neuron":
            pytest.skip("the official simulator has no scale switch")
        yield
        return
    from nkisim import config

    with config.configured(mx_scale=rule):
        yield
