"""Shape and stride algebra of views; no data here."""

from __future__ import annotations

import math

import numpy as np

from .errors import BoundsError, ShapeError


def contiguous_strides(shape) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def collapse(shape, strides) -> list[tuple[int, int]]:
    """The same access with as few (stride, count) levels as possible."""
    out: list[tuple[int, int]] = []
    for count, stride in zip(shape, strides, strict=True):
        if count == 1:
            continue
        if out and out[-1][0] == stride * count:
            out[-1] = (stride, out[-1][1] * count)
        else:
            out.append((stride, count))
    return out


def contiguous_run(shape, strides) -> int:
    """How many elements lie next to each other at the innermost level."""
    levels = collapse(shape, strides)
    return levels[-1][1] if levels and levels[-1][0] == 1 else 1


def overlaps(shape, strides) -> bool:
    """True if two elements of the access are the same address."""
    levels = sorted(collapse(shape, strides))
    reach = 0
    for stride, count in levels:
        if stride <= reach:
            break
        reach += stride * (count - 1)
    else:
        return False  # each level steps over all that the inner ones reach
    addresses = np.zeros(1, np.int64)
    for stride, count in levels:
        addresses = np.add.outer(addresses, np.arange(count, dtype=np.int64) * stride).reshape(-1)
    return len(np.unique(addresses)) != len(addresses)


def infer(shape, total: int) -> tuple[int, ...]:
    """Replace one -1 in `shape` so that the product is `total`."""
    shape = tuple(int(n) for n in shape)
    if shape.count(-1) > 1:
        raise ShapeError(f"shape {shape} has more than one -1")
    if -1 in shape:
        known = math.prod(n for n in shape if n != -1)
        if known == 0 or total % known:
            raise ShapeError(f"shape {shape} does not divide {total} elements")
        shape = tuple(total // known if n == -1 else n for n in shape)
    if any(n <= 0 for n in shape) or math.prod(shape) != total:
        raise ShapeError(f"shape {shape} has {math.prod(shape)} elements, need {total}")
    return shape


def reshape_strides(shape, strides, new_shape) -> tuple[int, ...]:
    """Strides of the same elements under `new_shape`; ShapeError if that needs a copy."""
    levels = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    merged: list[list[int]] = []
    for count, stride in levels:
        if merged and merged[-1][1] == stride * count:
            merged[-1] = [merged[-1][0] * count, stride]
        else:
            merged.append([count, stride])
    out: list[int] = []
    queue = list(merged)
    remaining, stride = (queue[0][0], queue[0][1]) if queue else (1, 1)
    position = 0
    for axis, extent in enumerate(new_shape):
        if extent == 1:
            out.append(math.prod(new_shape[axis + 1 :]) or 1)
            continue
        while remaining == 1 and position + 1 < len(queue):
            position += 1
            remaining, stride = queue[position]
        if remaining % extent:
            raise ShapeError(
                f"layout with shape {tuple(shape)}, strides {tuple(strides)} cannot be seen as {new_shape}"
            )
        remaining //= extent
        out.append(stride * remaining)
    return tuple(out)


def parse_slice(item: slice, extent: int, axis: int) -> tuple[int, int, int]:
    """(start, count, step) of a slice; out-of-range ends are errors, not clamped."""
    step = 1 if item.step is None else int(item.step)
    if step < 1:
        raise BoundsError(f"axis {axis}: slice step is {step}, need at least 1")
    start = 0 if item.start is None else int(item.start)
    stop = extent if item.stop is None else int(item.stop)
    start = start + extent if start < 0 else start
    stop = stop + extent if stop < 0 else stop
    if not 0 <= start < stop <= extent:
        raise BoundsError(f"axis {axis}: slice {item.start}:{item.stop} is not within 0..{extent} or is empty")
    return start, (stop - start + step - 1) // step, step


def rearrange_plan(shape, src_pattern, dst_pattern, sizes):
    """Split shape, permutation and merged shape of an einops-style rearrangement."""
    if len(src_pattern) != len(shape):
        raise ShapeError(
            f"source pattern {src_pattern} has {len(src_pattern)} groups, the tensor has {len(shape)} axes"
        )
    names, split, groups = [], [], []
    for group, extent in zip(src_pattern, shape, strict=True):
        members = (group,) if isinstance(group, str) else tuple(group)
        part = infer([sizes.get(m, -1) if len(members) > 1 else extent for m in members], extent)
        for member, size in zip(members, part, strict=True):
            if sizes.get(member, size) != size:
                raise ShapeError(f"axis {member!r} has {size} elements, {sizes[member]} were given")
        names += members
        split += part
        groups.append(part)
    flat = [m for g in dst_pattern for m in ((g,) if isinstance(g, str) else g)]
    if sorted(flat) != sorted(names) or len(set(names)) != len(names):
        raise ShapeError(f"patterns {src_pattern} and {dst_pattern} do not name the same axes once each")
    order = tuple(names.index(m) for m in flat)
    merged = tuple(math.prod(split[names.index(m)] for m in ((g,) if isinstance(g, str) else g)) for g in dst_pattern)
    return tuple(split), order, merged
