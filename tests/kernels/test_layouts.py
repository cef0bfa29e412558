"""Every way an array may lie in memory, for inputs and for `out=`.

A layout is drawn for each of x, dy, v and `out` by itself: order of the axes, steps (gaps, negative strides), an
offset, broadcast axes, misalignment, byte order, read-only memory, memory maps, subclasses, absurd strides of axes of
length 1, empty axes. What has to hold, for every function and for the layer:

- the values are the oracle's, within the table of `tolerances.py`;
- the bits are those of the dense native copy in the same order of axes (CHANGELOG.md, decisions);
- no byte of the memory behind an input changes, and no result shares memory with one;
- with `out=`, the same bits are there, and no byte of the memory behind it that is no element of it changes.
"""

import hashlib
import math
import os
import secrets
import tempfile
from typing import NamedTuple

import numpy as np
import pytest
from campaign import short_and_long
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from tolerances import (
    assert_same_bits,
    check_batch_norm,
    check_batch_norm_backward,
    check_batch_norm_eval,
    check_batch_norm_jvp,
    check_moments,
)

import bnfast
from bnfast import functional as F

# --- layouts ---------------------------------------------------------------------------------------------------

GAP = 0xA5  # every byte of memory that no element owns


class Subclass(np.ndarray):
    pass


class Layout(NamedTuple):
    """How an array lies in memory."""

    order: tuple[int, ...]  # of the axes in memory, slowest first
    steps: tuple[int, ...]  # along each axis; not 0
    starts: tuple[int, ...]  # elements left out before each axis
    broadcast: tuple[bool, ...]  # stride 0 along this axis: one element for all
    shift: int = 0  # bytes from an aligned address
    swapped: bool = False
    read_only: bool = False
    mapped: str | None = None  # mode of a memory map
    subclass: bool = False
    absurd: int | None = None  # stride of the axes of length 1


class Placed(NamedTuple):
    """An array, and all of the memory it is a view of, as bytes."""

    view: np.ndarray
    memory: np.ndarray


def place(values, layout, folder):
    """`values` in a layout; along a broadcast axis the first of them everywhere."""
    first = values[tuple(slice(1) if once else slice(None) for once in layout.broadcast)]
    dtype = values.dtype.newbyteorder("S" if layout.swapped else "=")
    lengths = [first.shape[i] * abs(layout.steps[i]) + layout.starts[i] for i in range(values.ndim)]
    in_order = [lengths[i] for i in layout.order]
    n_bytes = int(np.prod(in_order)) * dtype.itemsize

    def elements(memory):
        view = memory[layout.shift :][:n_bytes].view(dtype).reshape(in_order).transpose(np.argsort(layout.order))
        view = view[tuple(slice(start, None, abs(s)) for start, s in zip(layout.starts, layout.steps, strict=True))]
        return view[tuple(slice(None, None, -1 if step < 0 else 1) for step in layout.steps)]

    memory = np.full(n_bytes + layout.shift + 64, GAP, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][: n_bytes + layout.shift]  # begins at a multiple of 64
    elements(memory)[...] = first
    if layout.mapped is not None:  # "r": pages that nobody can write to
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(memory.tobytes() + bytes(1))  # a file of no bytes cannot be mapped
            file.flush()
            memory = np.memmap(file.name, np.uint8, layout.mapped)
    view = elements(memory)
    if layout.subclass:
        view = view.view(Subclass)
    if any(layout.broadcast):
        view = np.broadcast_to(view, values.shape, subok=True)
    if layout.absurd is not None:
        strides = tuple(layout.absurd if n == 1 else s for n, s in zip(view.shape, view.strides, strict=True))
        view = as_strided(view, view.shape, strides, subok=True, writeable=view.flags.writeable)
    if layout.read_only:
        view.flags.writeable = False
    return Placed(view, np.asarray(memory))


@st.composite
def layouts(draw, shape, dtype, *, writable=False):
    """Layouts that such an array can have; writable: that `out` can have."""
    ndim = len(shape)
    order = tuple(draw(st.permutations(range(ndim))))
    known = [tuple(range(ndim)), tuple(range(ndim))[::-1], (0, *range(2, ndim), 1), order]  # C, F, NHWC, any
    plain = draw(st.booleans())
    steps = st.just(1) if plain else st.sampled_from([1, 1, 1, 2, 3, -1, -2])
    starts = st.just(0) if plain else st.sampled_from([0, 0, 1, 2])
    once = st.just(False) if plain or writable else st.sampled_from([False, False, False, True])
    per_axis = [tuple(draw(s) for _ in range(ndim)) for s in (steps, starts, once)]
    per_axis[2] = tuple(one and n > 0 for one, n in zip(per_axis[2], shape, strict=True))
    return Layout(
        draw(st.sampled_from(known)),
        *per_axis,
        shift=draw(st.sampled_from([0, 0, 0, 1, dtype.itemsize // 2, dtype.itemsize, 3 * dtype.itemsize])),
        swapped=not writable and draw(st.integers(0, 5)) == 0,
        read_only=not writable and draw(st.integers(0, 3)) == 0,
        mapped=draw(st.sampled_from([None] * 6 + (["r+", "c"] if writable else ["r", "c", "r+"]))),
        subclass=draw(st.integers(0, 5)) == 0,
        absurd=draw(st.sampled_from([None, None, 0, 1, 12345677, -(2**40), 2**62 + 1])),
    )


class Case(NamedTuple):
    """Arguments of one example."""

    dtype: np.dtype
    shape: tuple[int, ...]
    axis: int
    x: Layout
    dy: Layout
    v: Layout
    outs: tuple[Layout, ...]  # one for each function
    seed: int


@st.composite
def cases(draw):
    lengths = st.one_of(st.integers(1, 6), st.sampled_from([0, 1, 16, 17, 33]))
    shape = tuple(draw(st.lists(lengths, min_size=2, max_size=5).filter(lambda shape: np.prod(shape) <= 4000)))
    dtype = np.dtype(draw(st.sampled_from([np.float32, np.float64])))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    inputs = [draw(layouts(shape, dtype)) for _ in range(3)]
    outs = tuple(draw(layouts(shape, dtype, writable=True)) for _ in range(5))
    return Case(dtype, shape, axis, *inputs, outs, draw(st.integers(0, 2**32 - 1)))


def kinds(case):
    """What is special about the layouts of a case."""
    found = {
        f"empty axis {'C' if i == case.axis % len(case.shape) else 'N or HW'}"
        for i, n in enumerate(case.shape)
        if not n
    }
    for role, layout in [("x", case.x), ("dy", case.dy), *(("out", out) for out in case.outs)]:
        view = place(np.ones(case.shape, case.dtype), layout, None).view
        found |= {
            f"{role}: {kind}"
            for kind, there in {
                "C order": view.flags.c_contiguous and view.size > 1,
                "F order": view.flags.f_contiguous and view.size > 1 and not view.flags.c_contiguous,
                "channels last": layout.order == (0, *range(2, view.ndim), 1),
                "negative strides": any(s < 0 for s, n in zip(view.strides, view.shape, strict=True) if n > 1),
                "gaps": any(abs(step) > 1 for step in layout.steps),
                "offset": any(layout.starts),
                "stride 0": any(s == 0 for s, n in zip(view.strides, view.shape, strict=True) if n > 1),
                "absurd stride": any(abs(s) > 2**39 for s in view.strides),
                "misaligned": not view.flags.aligned,
                "byte-swapped": not view.dtype.isnative,
                "read-only": not view.flags.writeable,
                "mapped r": layout.mapped == "r",
                "mapped c": layout.mapped == "c",
                "mapped r+": layout.mapped == "r+",
                "subclass": isinstance(view, Subclass),
                "one element": view.size == 1,
            }.items()
            if there
        }
    return found


# --- what has to hold ------------------------------------------------------------------------------------------


class Arguments(NamedTuple):
    """x, dy and v placed; parameters and statistics of the channels, (C,)."""

    x: Placed
    dy: Placed
    v: Placed
    gamma: np.ndarray
    beta: np.ndarray
    vgamma: np.ndarray
    vbeta: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    inv_std: np.ndarray

    def digest(self):
        memory = [a.memory if isinstance(a, Placed) else a for a in self]
        return [hashlib.sha256(a.tobytes()).hexdigest() for a in memory]


def arguments_of(case, folder):
    rng = np.random.default_rng(case.seed)
    channels = case.shape[case.axis]
    along = [1] * len(case.shape)
    along[case.axis] = channels
    mean, std = rng.normal(0, 3, channels), np.exp2(rng.uniform(-2, 2, channels))
    x = mean.reshape(along) + std.reshape(along) * rng.normal(size=case.shape)
    data = [x, rng.normal(size=case.shape), rng.normal(0.5, 1, case.shape)]
    layouts = case.x, case.dy, case.v
    placed = [place(a.astype(case.dtype), layout, folder) for a, layout in zip(data, layouts, strict=True)]
    parameters = rng.normal(size=(4, channels)).astype(rng.choice([np.float32, np.float64]))
    m = bnfast.moments(placed[0].view, axis=case.axis)
    var = m.m2 / max(1, m.count)
    return Arguments(*placed, *parameters, m.mean, var, 1 / np.sqrt(var + 1e-5))


def native(x):
    """The dense native copy in the same order of axes."""
    return np.array(x, x.dtype.newbyteorder("="), order="K", copy=True, subok=False)


def dense(a):
    """The same arguments, none of them a view."""
    return a._replace(**{name: Placed(native(getattr(a, name).view), None) for name in ("x", "dy", "v")})


def forward(a, **options):
    return F.batch_norm(a.x.view, a.gamma, a.beta, **options)


def evaluation(a, **options):
    return (F.batch_norm_eval(a.x.view, a.mean, a.var, a.gamma, a.beta, **options),)


def backward(a, **options):
    return F.batch_norm_backward(a.dy.view, a.x.view, a.mean, a.inv_std, a.gamma, **options)


def backward_eval(a, **options):
    return backward(a, training=False, **options)


def jvp(a, **options):
    directions = {"vgamma": a.vgamma, "vbeta": a.vbeta}
    return (F.batch_norm_jvp(a.v.view, a.x.view, a.mean, a.inv_std, a.gamma, **directions, **options),)


FUNCTIONS = [forward, evaluation, backward, backward_eval, jvp]
TRAINING = [forward, backward, jvp]  # these need two values a channel


def check_values(function, a, results, axis, copies):
    """Against the oracle. copies: how often x has every value."""
    x, dy, v = a.x.view, a.dy.view, a.v.view
    if function is forward:
        check_batch_norm(results, x, a.gamma, a.beta, axis=axis, copies=copies)
    elif function is evaluation:
        check_batch_norm_eval(results[0], x, a.mean, a.var, a.gamma, a.beta, axis=axis)
    elif function is jvp:
        statistics = {"vgamma": a.vgamma, "vbeta": a.vbeta}
        check_batch_norm_jvp(results[0], v, x, a.mean, a.inv_std, a.gamma, axis=axis, **statistics)
    else:
        training = function is backward
        check_batch_norm_backward(results, dy, x, a.mean, a.inv_std, a.gamma, axis=axis, training=training)


def assert_in_order_of(result, x):
    """Strides as numpy.empty_like(order="K") gives them, where an axis is longer than 1."""
    model = np.empty_like(x, order="K", subok=False)
    for length, stride, expected in zip(x.shape, result.strides, model.strides, strict=True):
        assert length == 1 or x.size == 0 or stride == expected, f"strides {result.strides}, not {model.strides}"


def assert_new(results, a):
    """Plain native arrays in memory of their own; the first lies as x does."""
    assert_in_order_of(results[0], a.x.view)
    for result in results:
        assert type(result) is np.ndarray
        assert result.dtype.isnative
        assert result.flags.writeable
        for argument in a:
            memory = argument.memory if isinstance(argument, Placed) else argument
            assert not np.may_share_memory(result, memory)


def assert_written(result, layout, expected, out, folder):
    """`out` was returned, and its memory is byte for byte what the expected values leave in this layout."""
    assert result is out.view
    assert_same_bits(np.asarray(out.view), expected)
    assert out.memory.tobytes() == place(expected, layout, folder).memory.tobytes(), "written beside the elements"


def out_for(case, i, folder):
    return place(np.full(case.shape, np.nan, case.dtype), case.outs[i], folder)


def check_functions(case, folder):
    a = arguments_of(case, folder)
    same = dense(a)
    before = a.digest()
    count = a.x.view.size // max(1, case.shape[case.axis])
    m, same_m = (bnfast.moments(given.x.view, axis=case.axis) for given in (a, same))
    assert m.count == same_m.count == count
    assert_same_bits(m.mean, same_m.mean, "moments.mean")
    assert_same_bits(m.m2, same_m.m2, "moments.m2")
    others = [i for i in range(len(case.shape)) if i != case.axis % len(case.shape)]
    copies = math.prod(case.shape[i] for i in others if case.x.broadcast[i])
    if a.x.view.size:
        check_moments(m, a.x.view, axis=case.axis, copies=copies)
    for i, function in enumerate(FUNCTIONS):
        if function in TRAINING and count < 2 and case.shape[case.axis]:
            with pytest.raises(ValueError, match="more than 1 value"):
                function(a, axis=case.axis)
            continue
        results, expected = function(a, axis=case.axis), function(same, axis=case.axis)
        for result, other in zip(results, expected, strict=True):
            assert_same_bits(result, other, function.__name__)
        assert_new(results, a)
        if a.x.view.size:
            check_values(function, a, results, case.axis, copies)
        out = out_for(case, i, folder)
        written = function(a, axis=case.axis, out=out.view)
        assert_written(written[0], case.outs[i], expected[0], out, folder)
        for result, other in zip(written[1:], expected[1:], strict=True):
            assert_same_bits(result, other, function.__name__)
    assert a.digest() == before, "an input was modified"


def step(bn, x, dy, outs=(None, None)):
    """Forward and backward: everything they give, and the layer's state after them."""
    y = bn(x, out=outs[0])
    dx = bn.backward(dy, out=outs[1])
    return [y, dx, bn.grad_gamma, bn.grad_beta, bn.running_mean, bn.running_var]


def check_layer(case, folder):
    a = arguments_of(case, folder)
    same = dense(a)
    before = a.digest()
    channels = case.shape[case.axis]
    if channels == 0:
        return  # there is no such layer
    layers = [bnfast.BatchNorm(channels, axis=case.axis, dtype=case.dtype) for _ in range(3)]
    for bn in layers:
        bn.gamma[...], bn.beta[...] = a.gamma, a.beta
    for training in (True, False):
        if training and a.x.view.size // channels < 2:
            continue
        for bn in layers:
            bn.train(training)
        outs = [out_for(case, i, folder) for i in range(2)]
        results = step(layers[0], a.x.view, a.dy.view)
        expected = step(layers[1], same.x.view, same.dy.view)
        written = step(layers[2], a.x.view, a.dy.view, [out.view for out in outs])
        for result, into_out, other in zip(results, written, expected, strict=True):
            assert_same_bits(result, other, "layer")
            assert_same_bits(np.asarray(into_out), other, "layer with out=")
        for i in range(2):
            assert_in_order_of(results[i], a.x.view)
            assert_written(written[i], case.outs[i], expected[i], outs[i], folder)
        assert_new(results[:1], a)
        assert_new(results[1:4], a)  # the running ones are read-only
        if training:
            y = F.batch_norm(a.x.view, layers[0].gamma, layers[0].beta, axis=case.axis)[0]
            assert_same_bits(results[0], y, "layer and function")
    assert a.digest() == before, "an input was modified"


def test_examples_have_every_kind_of_layout():
    """The short form's generator: none of what the first paragraph lists is missing."""
    found = set()

    @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(case=cases())
    def run(case):
        found.update(kinds(case))

    run()
    everywhere = {"C order", "F order", "channels last", "negative strides", "gaps", "offset", "absurd stride"}
    everywhere |= {"misaligned", "mapped c", "mapped r+", "subclass", "one element"}
    inputs = everywhere | {"stride 0", "byte-swapped", "read-only", "mapped r"}
    expected = {f"{role}: {kind}" for role in ("x", "dy") for kind in inputs} | {f"out: {kind}" for kind in everywhere}
    assert found == expected | {"empty axis C", "empty axis N or HW"}


@pytest.mark.parametrize("examples", short_and_long(200, 20_000))
@pytest.mark.parametrize("check", [check_functions, check_layer])
def test_any_layout(tmp_path, check, examples):
    """The short form has the same examples in every run, the long one others each time, from a seed that it prints."""

    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(case=cases())
    def run(case):
        note(f"{case}")
        check(case, tmp_path)

    if examples > 200:
        chosen = int(os.environ.get("BNFAST_TEST_SEED") or secrets.randbits(32))
        print(f"BNFAST_TEST_SEED={chosen}")
        run = seed(chosen)(run)
    run()
