"""AWS's CPU golden data for quantize_mx and nc_matmul_mx; cases and extents come from the manifest."""

import ml_dtypes
import numpy as np
import pytest

import nki.isa as nisa
import nki.language as nl
from golden_data import Golden

GOLDEN = Golden("blocks_trn")
X4 = {"e4m3": nl.float8_e4m3fn_x4, "e5m2": nl.float8_e5m2_x4, "e2m1": nl.float4_e2m1fn_x4}
RULES = {"v1": "ocp", "v2": "neuron"}
QUANTIZED = [
    n.rsplit(".", 1)[0] for n in GOLDEN.names() if n.endswith(".codes") and not n.split(".")[1] == "e2m1"
]  # e2m1 is quantized offline only
MATMULS = [c["matmul"] for c in GOLDEN.manifest["cases"] if "matmul" in c]


def test_the_manifest_has_cases():
    assert QUANTIZED
    assert MATMULS


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantize_mx(sim, case):
    group, element, version = case.split(".")
    x = GOLDEN[f"{group}.x"]
    partitions, width = x.shape
    columns = width // 4

    def body(x):
        sb, codes = nl.ndarray(x.shape, nl.bfloat16), nl.ndarray((partitions, columns), X4[element])
        scale = nl.ndarray((partitions, columns), nl.uint8)
        nisa.memset(scale, 0)
        nisa.dma_copy(sb, x)
        nisa.quantize_mx(dst=codes, src=sb, dst_scale=scale)
        out, out_scale = (
            nl.ndarray(codes.shape, nl.uint32, nl.shared_hbm),
            nl.ndarray(scale.shape, nl.uint8, nl.shared_hbm),
        )
        nisa.dma_copy(out, codes.view(nl.uint32))
        nisa.dma_copy(out_scale, scale)
        return out, out_scale

    words, scale = sim(body, x, mx_scale=RULES[version])
    codes = words.view(np.uint8).reshape(partitions, columns, 4)
    rows = [32 * (g // 4) + g % 4 for g in range(partitions // 8)]
    valid = GOLDEN[f"{case}.valid"] != 0
    assert valid.any()
    assert np.array_equal(scale[rows][valid], GOLDEN[f"{case}.scale"][valid])
    assert np.array_equal(scale[rows][valid], GOLDEN[f"{case}.scale_hw"][rows][valid])
    dead = np.setdiff1d(np.arange(partitions), rows)
    assert not scale[dead].any(), "quantize_mx touches rows that are not scales"
    keep = np.repeat(valid, 8, axis=0)
    assert np.array_equal(codes[keep], GOLDEN[f"{case}.codes"].reshape(partitions, columns, 4)[keep])


def packed(codes: np.ndarray, element: str) -> np.ndarray:
    """One code a byte [P, 4F] to x4 words [P, F]."""
    if element != "e2m1":
        return np.ascontiguousarray(codes).view(np.uint32)
    lanes = codes.reshape(codes.shape[0], -1, 4).astype(np.uint16)
    return lanes[..., 0] | lanes[..., 1] << 4 | lanes[..., 2] << 8 | lanes[..., 3] << 12


@pytest.mark.parametrize("offset", [0, 4, 8, 12])
@pytest.mark.parametrize("case", MATMULS)
def test_nc_matmul_mx(sim, case, offset):
    """Also with scales packed at every row offset of a quadrant."""
    left, right = case.split(".")[1].split("_")
    words = packed(GOLDEN[f"{case}.stationary"], left), packed(GOLDEN[f"{case}.moving"], right)
    scales = GOLDEN[f"{case}.stationary_scale"], GOLDEN[f"{case}.moving_scale"]
    want = GOLDEN[f"{case}.out"]
    partitions = words[0].shape[0]

    def body(a, b, sa, sb):
        tiles = []
        for hbm, element, scale_hbm in ((a, left, sa), (b, right, sb)):
            columns = hbm.shape[1]
            data = nl.ndarray((partitions, columns), X4[element])
            nisa.dma_copy(data, hbm.ap([[columns, partitions], [1, columns]], offset=0, dtype=X4[element]))
            scale = nl.ndarray((128, columns), nl.uint8)
            for q in range(-(-partitions // 32)):
                nisa.dma_copy(scale[32 * q + offset : 32 * q + offset + 4], scale_hbm[4 * q : 4 * q + 4])
            tiles.append((data, scale[offset:]))
        (s, ss), (m, ms) = tiles
        acc = nl.ndarray((s.shape[1], m.shape[1]), nl.float32, nl.psum)
        nisa.nc_matmul_mx(acc, s, m, ss, ms, accumulate=False)
        out = nl.ndarray(acc.shape, nl.float32)
        nisa.tensor_copy(out, acc)
        hbm = nl.ndarray(acc.shape, nl.float32, nl.shared_hbm)
        nisa.dma_copy(hbm, out)
        return hbm

    got = sim(body, *words, *scales)
    # One rounding to float32 (relative 2^-24), and sums in float64 on both sides (K * 2^-53 of the sum of magnitudes).
    magnitude = np.abs(decoded(words[0], left, scales[0])).T @ np.abs(decoded(words[1], right, scales[1]))
    bound = 2.0**-24 * np.abs(want) + 2 * 4 * partitions * 2.0**-53 * magnitude
    assert (np.abs(got.astype(np.float64) - want) <= bound).all()


def decoded(words: np.ndarray, element: str, scale: np.ndarray) -> np.ndarray:
    """Values [4P, columns] of x4 words under dense scales, for the error bound."""
    kinds = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}
    width = 4 if element == "e2m1" else 8
    lanes = np.stack([(words >> (width * j)) & (2**width - 1) for j in range(4)], axis=1).astype(np.uint8)
    values = lanes.view(kinds[element]).astype(np.float64)
    factor = np.ldexp(1.0, np.repeat(scale, 8, axis=0).astype(int) - 127)
    return (values * factor[:, None, :]).reshape(-1, words.shape[1])
