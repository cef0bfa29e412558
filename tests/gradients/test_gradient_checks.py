"""Derivatives along directions: the numbers, the planted bugs that are found, the kinks that are not taken for bugs."""

import itertools
import pickle
import re
import threading

import numpy as np
import pytest
from layers import Chain

import bnfast
from bnfast import BatchNorm, check_gradient, check_layer, directional_derivative
from bnfast.commands.network import Linear, ReLU

# --- directional_derivative ------------------------------------------------------------------------------------


def surface(p):
    return np.sin(p[0]) * np.exp(p[1])


def surface_gradient(p):
    return np.array([np.cos(p[0]) * np.exp(p[1]), np.sin(p[0]) * np.exp(p[1])])


@pytest.mark.parametrize("angle", np.linspace(0, 2 * np.pi, 9))
def test_the_derivative_is_fx_cos_plus_fy_sin(angle):
    point, u = np.array([0.3, 0.7]), np.array([np.cos(angle), np.sin(angle)])
    value, error = directional_derivative(surface, point, u)
    exact = surface_gradient(point) @ u
    assert abs(value - exact) <= error <= 1e-8


def test_the_derivative_is_largest_along_the_gradient():
    point = np.array([0.3, 0.7])
    gradient = surface_gradient(point)
    angles = np.arctan2(gradient[1], gradient[0]) + np.linspace(-np.pi, np.pi, 41)
    slopes = [directional_derivative(surface, point, [np.cos(a), np.sin(a)]).value for a in angles]
    assert np.argmax(slopes) == 20
    assert slopes[20] == pytest.approx(np.linalg.norm(gradient), rel=1e-9)


def test_the_derivative_is_proportional_to_the_direction():
    one, ten = (directional_derivative(surface, [0.3, 0.7], np.multiply(s, [0.6, 0.8])) for s in (1, -10))
    assert float(ten) == pytest.approx(-10 * float(one), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_steps_find_the_scale_of_the_function(scale):
    value, error = directional_derivative(lambda x: np.sin(x[0] / scale), [0.5 * scale], [1.0])
    assert abs(value - np.cos(0.5) / scale) <= error <= 1e-8 / scale


def test_float32_is_moved_in_float32():
    seen = set()

    def f(x):
        seen.add(x.dtype)
        return (x**3).sum()

    value, error = directional_derivative(f, np.array([1, 2], np.float32), [0.6, 0.8])
    assert abs(value - (3 * 0.6 + 12 * 0.8)) <= error <= 1e-2
    assert seen == {np.dtype(np.float32)}


def test_at_a_kink_the_error_reaches_both_slopes():
    value, error = directional_derivative(lambda x: abs(x[0]) + 2 * x[0], [0.0], [1.0])
    assert value == pytest.approx(2)
    assert error == pytest.approx(1)


@pytest.mark.parametrize("distance", np.geomspace(1e-4, 1, 60))
def test_the_error_covers_a_kink_at_any_distance(distance):
    value, error = directional_derivative(lambda x: abs(x[0] - distance), [0.0], [1.0], step=0.16)
    assert abs(value - -1) <= error


@pytest.mark.parametrize("seed", range(3))
def test_the_error_covers_noise(seed):
    noise, off = np.random.default_rng(seed), []
    for _ in range(300):
        value, error = directional_derivative(lambda x: x[0] + 1e-9 * noise.normal(), [1.0], [1.0])
        off.append(abs(value - 1) / error)
    assert max(off) < 2


@pytest.mark.parametrize("x", [0.0, 1e-12, 1e-6])
def test_a_small_x_is_moved_far_enough(x):
    value, error = directional_derivative(lambda x: np.exp(x[0]), [x], [1.0])
    assert abs(value - np.exp(x)) <= error <= 1e-8


def test_a_given_step_is_taken():
    moves = set()

    def f(x):
        moves.add(round(abs(float(x[0]) - 1), 12))
        return x[0] ** 2

    assert directional_derivative(f, [1.0], [1.0], step=0.16).value == pytest.approx(2)
    assert moves == {0.0, 0.16, 0.04, 0.01}


def test_the_function_may_change_its_argument():
    x = np.array([0.5, 1.0])

    def f(moved):
        moved *= 2
        return moved.sum()

    assert directional_derivative(f, x, [1, 1]).value == pytest.approx(4)
    np.testing.assert_array_equal(x, [0.5, 1.0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(x=[1]), TypeError, r"x: expected an array of float32 or float64, got dtype int"),
        (dict(x=[]), ValueError, r"x: expected at least one value, got shape \(0,\)"),
        (dict(x=[np.nan]), ValueError, r"x: expected finite values"),
        (dict(u=[1.0, 0.0]), ValueError, r"u: expected shape \(1,\), that of x, got \(2,\)"),
        (dict(u=[0.0]), ValueError, r"u: expected a direction"),
        (dict(u=[np.inf]), ValueError, r"u: expected a direction"),
        (dict(step=0), ValueError, r"step: expected a positive finite number, got 0"),
        (dict(step=np.nan), ValueError, r"step: expected a positive finite number"),
        (dict(step=1e-20), ValueError, r"step: expected a step that moves x, got 1e-20"),
        (dict(f=lambda x: np.ones(2)), TypeError, r"f: expected a real number, got dtype float64 of shape \(2,\)"),
        (dict(f=lambda x: "1"), TypeError, r"f: expected a real number"),
        (dict(f=lambda x: np.nan), ValueError, r"f: expected a finite number at x, got nan"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        directional_derivative(**{"f": lambda x: x[0], "x": [1.0], "u": [1.0], **arguments})


# --- check_gradient --------------------------------------------------------------------------------------------


def log_sum_exp(x):
    return np.log(np.exp(x).sum())


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


X = np.random.default_rng(5).normal(size=(4, 3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_right_gradient_is_ok(dtype):
    check = check_gradient(log_sum_exp, softmax, X.astype(dtype))
    assert check
    assert check.ok
    assert check.verdict == "ok"
    check.raise_if_failed()
    assert [row.direction for row in check.rows] == ["gradient", *"1234567"]
    assert {row.verdict for row in check.rows} == {"ok"}
    assert max(row.relative_error for row in check.rows) < {np.float32: 1e-3, np.float64: 1e-9}[dtype]


def test_the_error_of_the_increment_is_of_order_2_where_the_gradient_is_right_and_1_where_it_is_wrong():
    for gradient, order in ((softmax, 2), (lambda x: 1.01 * softmax(x), 1)):
        rows = check_gradient(log_sum_exp, gradient, X).rows
        np.testing.assert_allclose([row.order for row in rows], order, atol=0.05)


def test_a_linear_function_leaves_no_error():
    check = check_gradient(lambda x: (3 * x).sum(), np.full((4, 3), 3.0), X)
    assert check.ok
    assert all(row.order == np.inf for row in check.rows)
    assert "exact" in check.table


@pytest.mark.parametrize(("factor", "ok"), [(1 + 1e-7, True), (1 + 1e-5, False), (0.5, False), (0, False), (-1, False)])
def test_the_tolerance_lies_where_it_is_said_to(factor, ok):
    assert check_gradient(log_sum_exp, lambda x: factor * softmax(x), X).ok is ok


def test_a_wider_tolerance_lets_more_through():
    assert check_gradient(log_sum_exp, 1.001 * softmax(X), X, rtol=1e-2).ok


@pytest.mark.parametrize(("factor", "ok"), [(1 + 1e-4, True), (1.01, False)])
def test_float32_has_a_tolerance_of_its_own(factor, ok):
    assert check_gradient(log_sum_exp, lambda x: factor * softmax(x), X.astype(np.float32)).ok is ok


def test_one_wrong_element_of_a_thousand_is_found():
    x = np.random.default_rng(0).normal(size=1000)
    gradient = 2 * x
    gradient[567] *= 1.1
    assert check_gradient(lambda x: (x * x).sum(), 2 * x, x).ok
    assert check_gradient(lambda x: (x * x).sum(), gradient, x).verdict == "wrong"


def test_nan_in_a_gradient_is_wrong():
    gradient = softmax(X)
    gradient[0, 0] = np.nan
    check = check_gradient(log_sum_exp, gradient, X)
    assert check.verdict == "wrong"
    assert all(row.relative_error == np.inf for row in check.rows)


@pytest.mark.parametrize("offset", [1e6, 1e12, 1e16])
@pytest.mark.parametrize("factor", [2, 3])
def test_what_drowns_in_rounding_is_never_ok_by_that(offset, factor):
    verdict = check_gradient(lambda x: offset + (x * x).sum(), factor * X, X).verdict
    assert verdict == ({2: "ok", 3: "wrong"}[factor] if offset == 1e6 else "inconclusive")


def test_a_constant_function_is_inconclusive():
    check = check_gradient(lambda x: 5.0, np.zeros_like, X)
    assert check.verdict == "inconclusive"
    assert "along no direction does f change by more than its rounding" in str(check)


def test_noise_does_not_settle():
    noise = np.random.default_rng(0)
    check = check_gradient(lambda x: x.sum() + 1e-3 * noise.normal(), np.ones_like, X)
    assert check.verdict == "inconclusive"
    assert "only 0 of 8 directions of x can be judged" in check.summary
    assert "do not settle (fewer values or a smoother f)" in check.summary


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_is_enough(shape):
    x = np.full(shape, 0.7)
    assert check_gradient(lambda x: np.sin(x).sum(), np.cos, x).ok
    assert not check_gradient(lambda x: np.sin(x).sum(), np.sin, x).ok


def test_same_rng_same_report():
    def report(rng):
        return str(check_gradient(log_sum_exp, softmax, X, rng=rng))

    assert report(None) == report(None) == report(0)
    assert report(1) == report(np.int64(1)) != report(0)
    one, other = np.random.default_rng(0), np.random.default_rng(0)
    assert report(one) == report(other)
    assert report(one) != report(np.random.default_rng(0))  # it has moved on


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(rng=1.5), TypeError, "rng: expected an int, got float"),
        (dict(rng=True), TypeError, "rng: expected an int, got True"),
        (dict(rng=-1), ValueError, "rng: expected None, an int of at least 0"),
        (dict(directions=0), ValueError, "directions: expected at least 1, got 0"),
        (dict(directions=2.0), TypeError, "directions: expected an int"),
        (dict(rtol=0), ValueError, "rtol: expected a positive finite number"),
        (dict(grad=np.ones(3)), ValueError, r"grad: expected shape \(4, 3\), got \(3,\)"),
        (dict(grad=lambda x: x.astype(complex)), TypeError, "grad: expected real numbers, got dtype complex128"),
        (dict(grad=lambda x: None), TypeError, r"grad: expected an array of shape \(4, 3\), got NoneType"),
        (dict(grad=lambda x: {"x": x}), TypeError, r"grad: expected an array of shape \(4, 3\), got dict"),
        (dict(f=lambda x: None), TypeError, r"f: expected a real number, got None \(is there a return\?\)"),
        (
            dict(f=lambda x: (1.0, x, x)),
            TypeError,
            r"f: expected a real number, or \(value, gradient\), got a tuple of 3",
        ),
        (
            dict(f=lambda x: (1.0, x[0])),
            TypeError,
            r"f: expected a real number, or \(value, gradient\), got a tuple of 2",
        ),
    ],
)
def test_check_gradient_refuses_wrong_arguments(options, error, words):
    with pytest.raises(error, match=words):
        check_gradient(**{"f": log_sum_exp, "grad": softmax, "x": X, **options})


@pytest.mark.parametrize("x", [np.array([0.3, 0.7, 2.0]), np.array([0.3, 0.7]), np.array(0.7), X])
def test_functions_that_give_value_and_gradient(x):
    def both(x):
        return np.sin(x).sum(), np.cos(x)

    def both_wrong(x):
        return np.sin(x).sum(), np.sin(x)

    assert check_gradient(both, both, x).ok
    assert check_gradient(both, np.cos(x), x).ok
    assert check_gradient(both, both_wrong, x).verdict == "wrong"


def test_two_numbers_for_two_are_their_gradient():
    assert check_gradient(lambda x: x[0] + x[1] ** 2, lambda x: (1.0, 2 * x[1]), [1.0, 2.0]).ok


@pytest.mark.parametrize("x", [1e-310, 1e-300, 5e-324, 0.0])
def test_what_is_all_but_zero_is_moved_as_zero(x):
    assert check_gradient(lambda x: np.sin(x[0]) + x[0] ** 2, lambda x: np.cos(x) + 2 * x, [x]).ok
    assert check_gradient(lambda x: np.sin(x[0]) + x[0] ** 2, lambda x: np.sin(x), [x]).verdict == "wrong"


# --- the report ------------------------------------------------------------------------------------------------


def test_the_report_prints_as_a_table():
    check = check_gradient(log_sum_exp, softmax, X, directions=3)
    lines = str(check).splitlines()
    assert lines[0].startswith("log_sum_exp: ok: 3 of 3 directions of x judged, largest relative error ")
    assert re.split(r"\s{2,}", lines[1]) == [
        "input", "direction", "numeric", "analytic", "relative error", "order", "verdict",
    ]  # fmt: skip
    assert len(lines) == 5
    for line, row in zip(lines[2:], check.rows, strict=True):
        cells = line.split()
        assert cells[:2] == ["x", row.direction]
        assert [float(cell) for cell in cells[2:5]] == pytest.approx(
            [row.numeric, row.analytic, row.relative_error], rel=0.1
        )
        assert cells[5:] == ["2.00", "ok"]
    assert repr(check) == str(check)
    assert check.table == "\n".join(lines[1:])
    assert pickle.loads(pickle.dumps(check)) == check


def test_html_is_escaped():
    class Nasty(Planted):
        def parameters(self):
            return {"<script>": self.gamma, "a&b": self.beta}

        def gradients(self):
            return {"<script>": self.grad_gamma, "a&b": self.grad_beta}

    Nasty.__name__ = "<b>"
    html = check_layer(Nasty(), planted_data())._repr_html_()
    assert html.startswith("<table>")
    assert "&lt;script&gt;" in html
    assert "a&amp;b" in html
    assert "<caption>&lt;b&gt;: ok" in html
    assert "<script>" not in html
    assert "<b>" not in html
    assert html.count("<tr>") == 1 + 24


def test_a_failed_check_raises_with_its_table():
    check = check_gradient(log_sum_exp, lambda x: 2 * softmax(x), X)
    assert not check
    with pytest.raises(AssertionError, match="wrong") as caught:
        check.raise_if_failed()
    assert str(caught.value) == str(check)


# --- check_layer: planted bugs ---------------------------------------------------------------------------------


class Planted:
    """Batch normalisation of (N, C), forward right, backward with a bug."""

    eps = 1e-3

    def __init__(self, bug="none", channels=6, dtype=np.float64):
        self.bug = bug
        self.gamma = np.linspace(0.5, 2, channels).astype(dtype)
        self.beta = np.linspace(-1, 1, channels).astype(dtype)

    def forward(self, x):
        self.x, self.mean = x, x.mean(0)
        self.inv_std = 1 / np.sqrt(x.var(0) + x.dtype.type(self.eps))
        self.x_hat = (x - self.mean) * self.inv_std
        return self.gamma * self.x_hat + self.beta

    def backward(self, dy):
        m, x_hat, inv_std, axis = len(dy), self.x_hat, self.inv_std, 0
        if self.bug == "wrong axis":
            axis = 1
        if self.bug == "M - 1 for M":
            m -= 1
        if self.bug == "eps left out":
            inv_std = 1 / self.x.std(0)
        dbeta, dgamma = dy.sum(axis), (dy * x_hat).sum(axis)
        self.grad_beta = dbeta
        self.grad_gamma = (dy * self.x).sum(0) if self.bug == "dgamma with x" else dgamma
        if self.bug == "statistics are constants":
            return self.gamma * inv_std * dy
        if self.bug == "no term of the mean":
            return self.gamma * inv_std * (dy - x_hat * dgamma / m)
        if self.bug == "no term of the variance":
            return self.gamma * inv_std * (dy - dbeta / m)
        if self.bug == "sign of a term":
            return self.gamma * inv_std * (dy - dbeta / m + x_hat * dgamma / m)
        if self.bug == "gamma forgotten":
            return inv_std * (dy - dbeta / m - x_hat * dgamma / m)
        return self.gamma * inv_std * (dy - dbeta / m - x_hat * dgamma / m)

    def parameters(self):
        return {"gamma": self.gamma, "beta": self.beta}

    def gradients(self):
        return {"gamma": self.grad_gamma, "beta": self.grad_beta}


def planted_data(n_rows=6, dtype=np.float64):
    return np.random.default_rng(3).normal(2, 1.5, (n_rows, 6)).astype(dtype)


# bug: the largest relative error in the report, as measured, and the inputs whose gradient is wrong
BUGS = {
    "statistics are constants": (0.992, {"x"}),
    "no term of the mean": (0.989, {"x"}),
    "no term of the variance": (0.638, {"x"}),
    "M - 1 for M": (0.466, {"x"}),  # of 6 rows; it falls like M**-1.5
    "wrong axis": (1.56, {"x", "gamma", "beta"}),
    "sign of a term": (0.982, {"x"}),
    "gamma forgotten": (0.566, {"x"}),
    "dgamma with x": (1.30, {"gamma"}),
    "eps left out": (0.00215, {"x"}),  # eps / var / 2
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_a_bug_the_layer_is_ok(dtype):
    check = check_layer(Planted(dtype=dtype), planted_data(dtype=dtype))
    check.raise_if_failed()
    assert {(row.input, row.direction) for row in check.rows} >= {("x", "gradient"), ("gamma", "3"), ("beta", "7")}
    assert len(check.rows) == 24


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_planted_bug_is_caught(bug, dtype):
    error, inputs = BUGS[bug]
    if bug == "eps left out" and dtype == np.float32:
        pytest.skip("smaller than what float32 can tell")
    check = check_layer(Planted(bug, dtype=dtype), planted_data(dtype=dtype))
    assert check.verdict == "wrong"
    assert {row.input for row in check.rows if row.verdict == "wrong"} == inputs
    assert max(row.relative_error for row in check.rows) == pytest.approx(error, rel=0.01)
    for name in inputs:  # and not along one lucky direction alone
        rows = [row for row in check.rows if row.input == name]
        assert sum(row.verdict == "wrong" for row in rows) >= 6
        assert min(row.order for row in rows if row.verdict == "wrong") < 1.5


@pytest.mark.parametrize("n_rows", [64, 1000])
def test_m_for_m_less_1_is_caught_in_large_batches(n_rows):
    assert check_layer(Planted(), planted_data(n_rows)).ok
    assert check_layer(Planted("M - 1 for M"), planted_data(n_rows)).verdict == "wrong"


# --- check_layer: kinks ----------------------------------------------------------------------------------------


def test_relu_is_ok_though_values_are_near_its_kink():
    x = np.random.default_rng(0).normal(size=(64, 50))
    x.flat[:4] = 1e-3, -1e-4, 1e-5, -1e-6
    check_layer(ReLU(), x).raise_if_failed()


def test_relu_in_float32_is_never_wrong():
    """Its steps are large, so they cross many kinks: inconclusive at worst."""
    for seed in range(40):
        x = np.random.default_rng(seed).normal(size=(30, 20)).astype(np.float32)
        assert check_layer(ReLU(), x, rng=seed).verdict != "wrong"
        assert not check_layer(LeakyBug(), x, rng=seed).ok


def test_a_direction_that_crosses_a_kink_is_marked_and_does_not_fail():
    x = np.random.default_rng(0).normal(size=(8, 5))
    x[3, 2] = 0
    check = check_layer(ReLU(), x)
    assert {row.verdict for row in check.rows} == {"ok", "kink"}  # along the gradient x[3, 2] does not move
    assert sum(row.verdict == "kink" for row in check.rows) == 7
    assert check.verdict == "inconclusive"
    assert "only 1 of 8 directions of x can be judged: 7 cross a kink (move x away from it" in check.summary
    with pytest.raises(AssertionError, match="inconclusive"):
        check.raise_if_failed()


def test_opposite_kinks_of_two_outputs_are_seen():

    class Both(ReLU):
        def forward(self, x):
            self.x = x
            return np.stack([np.abs(x), -np.abs(x)])

        def backward(self, dy):
            return (dy[0] - dy[1]) * np.sign(self.x)

    check = check_layer(Both(), np.zeros(1))
    assert {row.verdict for row in check.rows} == {"kink"}


def test_a_small_kink_is_seen_beneath_curvature():
    def f(x):
        return (np.sin(x) + np.exp(x) + 4e-6 * np.maximum(x, 0)).sum()

    check = check_gradient(f, lambda x: np.cos(x) + np.exp(x) + 4e-6 * (x > 0), np.zeros(3))
    assert check.verdict != "wrong"
    assert "kink" in {row.verdict for row in check.rows}


class LeakyBug(ReLU):
    """Wrong for positive inputs, and right nowhere."""

    def backward(self, dy):
        return 0.9 * dy * self.positive


@pytest.mark.parametrize("n_zeros", [0, 1, 5, 40])
def test_a_bug_cannot_hide_behind_kinks(n_zeros):
    x = np.random.default_rng(0).normal(size=(8, 5))
    x.flat[:n_zeros] = 0
    check = check_layer(LeakyBug(), x)
    assert not check.ok
    if n_zeros < 40:
        assert check.verdict == "wrong"  # along the gradient, where nothing at a kink moves
    else:
        assert check.verdict == "inconclusive"


def test_whether_there_is_a_kink_does_not_depend_on_the_gradient():
    x = np.random.default_rng(0).normal(size=(8, 5))
    x[3, 2] = 0
    right, wrong = (check_layer(layer, x).rows for layer in (ReLU(), LeakyBug()))
    assert [row.verdict == "kink" for row in right] == [row.verdict == "kink" for row in wrong]


def test_a_network_is_a_layer(rng):
    network = Chain(
        Linear(5, 7, rng, np.float64), BatchNorm(7, dtype=np.float64), ReLU(), Linear(7, 3, rng, np.float64)
    )
    check = check_layer(network, rng.normal(3, 1, (16, 5)))
    check.raise_if_failed()
    # a bias in front of batch normalisation has no effect: its gradient is 0, and so are the differences
    assert {row.verdict for row in check.rows if row.input.startswith("0.bias")} == {"zero"}
    assert {row.verdict for row in check.rows if not row.input.startswith("0.bias")} == {"ok"}
    assert f"{sum(row.verdict == 'zero' for row in check.rows)} zero to rounding" in check.summary


# --- check_layer: BatchNorm, and that nothing is touched -------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"axis": -1}]
)
def test_batch_norm_is_ok(dtype, training, options):
    bn = BatchNorm(4, dtype=dtype, **options)
    shape = (3, 5, 5, 4) if options == {"axis": -1} else (3, 4, 5, 5)
    x = np.random.default_rng(1).normal(3, 2, shape).astype(dtype)
    bn(x)
    check = check_layer(bn.train(training), x)
    check.raise_if_failed()
    assert {row.input for row in check.rows} == ({"x"} if "affine" in options else {"x", "gamma", "beta"})


@pytest.mark.parametrize("mean", [100, 1e4])
def test_a_mean_far_from_zero_is_no_obstacle(dtype, mean):
    x = np.random.default_rng(1).normal(mean, 1, (16, 3)).astype(dtype)
    check_layer(BatchNorm(3, dtype=dtype), x).raise_if_failed()


def test_a_kink_just_inside_of_a_step_is_not_taken_for_a_bug():
    rng, dtype = np.random.default_rng(30), np.float32  # found among 300 like it
    shape, mean, std = (rng.integers(2, 40), rng.integers(1, 8)), 10 ** rng.uniform(-2, 3), 10 ** rng.uniform(-2, 2)
    x = rng.normal(mean, std, shape).astype(dtype)
    network = Chain(Linear(shape[1], 6, rng, dtype), BatchNorm(6), ReLU(), Linear(6, 3, rng, dtype))
    assert check_layer(network, x, rng=30).verdict != "wrong"


def test_what_float32_cannot_resolve_is_inconclusive():
    x = np.random.default_rng(1).normal(970, 0.01, (16, 6)).astype(np.float32)
    assert check_layer(BatchNorm(6), x).verdict == "inconclusive"


def test_a_function_that_saturates_within_the_smallest_step_is_inconclusive():
    """The quotients, 1/t, are small beside the gradient, and so are their differences."""
    x = np.zeros(3, np.float32)
    assert check_gradient(lambda x: np.tanh(1e7 * x).sum(), np.full(3, 1e7), x).verdict == "inconclusive"


def test_memory_order_is_kept():
    seen = set()

    class Looking(Planted):
        def forward(self, x):
            seen.add(x.flags.f_contiguous)
            return super().forward(x)

    check_layer(Looking(), np.asfortranarray(planted_data()))
    assert seen == {True}


def snapshot(bn):
    held = (bn.gamma, bn.beta, bn.grad_gamma, bn.grad_beta, bn.running_mean, bn.running_var)
    return (
        [None if array is None else array.tobytes() for array in held],
        [*map(id, held[:4])],
        id(bn._contents.value),
        bn.training,
        bn.num_batches_tracked,
    )


def used_layer():
    bn = BatchNorm(6, dtype=np.float64)
    bn(planted_data())
    bn.backward(planted_data())
    return bn


def test_the_layer_is_not_touched():
    bn, x = used_layer(), planted_data()
    dx = bn.vjp(x)[1](x).tobytes()
    bn(x)
    before, bytes_of_x = snapshot(bn), x.tobytes()
    check_layer(bn, x)
    assert snapshot(bn) == before
    assert x.tobytes() == bytes_of_x
    assert bn.backward(x).tobytes() == dx  # its forward still waits


@pytest.mark.parametrize("at", [1, 2, 3, 10, 60, 200])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_layer_is_not_touched_by_a_check_that_fails(at, error, monkeypatch):
    bn, calls = used_layer(), 0
    forward = BatchNorm.forward
    before = snapshot(bn)

    def failing(self, x, out=None):
        nonlocal calls
        calls += 1
        if calls == at:
            raise error("planted")
        return forward(self, x, out)

    monkeypatch.setattr(BatchNorm, "forward", failing)
    with pytest.raises(error, match="planted"):
        check_layer(bn, planted_data())
    assert snapshot(bn) == before


def test_a_layer_with_random_numbers_repeats_them():
    class Dropout:
        def __init__(self):
            self.rng = np.random.default_rng(0)

        def forward(self, x):
            self.kept = self.rng.random(x.shape) < 0.5
            return x * self.kept

        def backward(self, dy):
            return dy * self.kept

    layer = Dropout()
    before = str(layer.rng.bit_generator.state)
    check_layer(layer, X).raise_if_failed()
    assert str(layer.rng.bit_generator.state) == before


class Plain:
    """A layer with nothing to learn."""

    def forward(self, x):
        self.x = x
        return self.square(x)

    def square(self, x):
        return x * x

    def backward(self, dy):
        return 2 * self.x * dy


@pytest.mark.parametrize("layer", [Plain(), type("Fixed", (Plain,), {"parameters": None, "gradients": None})()])
def test_a_plain_layer_without_parameters_is_enough(layer):
    check = check_layer(layer, X)
    check.raise_if_failed()
    assert {row.input for row in check.rows} == {"x"}


FRESH = itertools.count()  # what no copy of a layer brings back


def variant(base=Plain, **methods):
    return type("Variant", (base,), methods)()


@pytest.mark.parametrize(
    ("layer", "x", "error", "words"),
    [
        (object(), X, TypeError, "layer: expected an object with forward and backward, got object"),
        (Plain, X, TypeError, "layer: expected an object with forward and backward, got the class Plain"),
        (variant(forward=lambda s, x: (x, x)), X, TypeError, "layer: expected an array of forward, got a tuple of 2"),
        (Plain(), np.ones(3, int), TypeError, "x: expected an array of float32 or float64, got dtype int64"),
        (Plain(), np.ones((0, 3)), ValueError, r"x: expected at least one value, got shape \(0, 3\)"),
        (Plain(), np.full(3, 1e200), ValueError, "layer: expected finite results of forward"),
        (variant(backward=lambda s, dy: dy[0]), X, ValueError, r"backward's dx: expected shape \(4, 3\), got \(3,\)"),
        (
            variant(backward=lambda s, dy: None),
            X,
            TypeError,
            r"backward's dx: expected an array of shape \(4, 3\), got NoneType",
        ),
        (
            variant(forward=lambda s, x: x > 0),
            X,
            TypeError,
            "expected floating-point numbers of forward, got dtype bool",
        ),
        (variant(square=lambda s, x: x * x + next(FRESH)), X, ValueError, "got different ones"),
        (
            variant(lock=threading.Lock(), __reduce__=lambda s: (Plain, (s.lock,))),
            X,
            TypeError,
            "copy.deepcopy can copy",
        ),
        (
            variant(Planted, parameters=lambda s: [s.gamma]),
            planted_data(),
            TypeError,
            r"parameters\(\): expected a dict",
        ),
        (variant(Planted, gradients=None), planted_data(), TypeError, "or neither; gradients is missing"),
        (variant(Planted, gradients={}), planted_data(), TypeError, "or neither; gradients is an attribute, dict"),
        (variant(parameters={"w": X}, gradients={}), X, TypeError, "or neither; parameters is an attribute, dict"),
        (variant(gradients=lambda s: {}), X, TypeError, "or neither; parameters is missing"),
        (
            variant(Planted, gradients=lambda s: {"gamma": s.grad_gamma}),
            planted_data(),
            ValueError,
            r"expected the keys of parameters\(\), \['gamma', 'beta'\], got \['gamma'\]",
        ),
        (
            variant(Planted, gradients=lambda s: {"gamma": s.grad_gamma, "beta": s.grad_beta, "w": s.grad_beta}),
            planted_data(),
            ValueError,
            r"got \['gamma', 'beta', 'w'\]",
        ),
        (
            variant(Planted, gradients=lambda s: {"gamma": s.grad_gamma, "beta": 0.0}),
            planted_data(),
            ValueError,
            r"gradients\(\)\['beta'\]: expected shape \(6,\), got \(\)",
        ),
        (
            variant(Planted, parameters=lambda s: {"gamma": s.gamma.copy(), "beta": s.beta}),
            planted_data(),
            ValueError,
            "expected the array of 'gamma' that the layer uses, got a copy",
        ),
    ],
)
def test_check_layer_refuses_what_it_cannot_check(layer, x, error, words):
    with np.errstate(over="ignore"), pytest.raises(error, match=words):
        check_layer(layer, x)


def test_layer_checks_repeat():
    reports = [str(check_layer(Planted(), planted_data(), rng=rng)) for rng in (None, 0, 1)]
    assert reports[0] == reports[1] != reports[2]


def test_dy_is_not_the_numbers_that_x_was_made_of():
    """With dy = x_hat, dx is zero, and there would be nothing to check."""
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=(8, 3))
        check = check_layer(BatchNorm(3, dtype=np.float64), x, rng=seed)
        check.raise_if_failed()
        assert max(abs(row.analytic) for row in check.rows if row.input == "x") > 0.1


def test_public_names():
    assert isinstance(check_layer(Plain(), X), bnfast.GradientCheck)


# --- entries of very different size --------------------------------------------------------------------------------


def test_entries_of_very_different_size_are_moved_in_proportion():
    """x0 of 1e5 and x1 of 1e-5, whose slopes are alike: steps that suit one do not suit the other."""

    def f(x):
        return x[0] ** 2 + np.sin(1e5 * x[1])

    x, right = np.array([1e5, 1e-5]), np.array([2e5, 1e5 * np.cos(1.0)])
    check = check_gradient(f, right, x)
    assert check.ok
    assert {row.input for row in check.rows} == {"x", "x[1]"}
    assert {row.verdict for row in check.rows} == {"ok"}
    for wrong in ([2e5, -right[1]], [2e5, 0.0], [2e5, 1.1 * right[1]], [-2e5, right[1]], [2.001e5, right[1]]):
        assert check_gradient(f, np.array(wrong), x).verdict == "wrong"


@pytest.mark.parametrize("share", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("factor", [-1, 0, 1.5])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_wrong_sign_in_a_small_slice_is_found(share, factor, axis):
    """Of a gradient whose other slices are 1 / share as large: along any axis, with its place in the report."""
    shape = (5, 4, 3)
    scale = np.ones([n if i == axis else 1 for i, n in enumerate(shape)])
    scale.ravel()[2] = share

    def f(x):
        return np.sum(scale * np.sin(x))

    x = np.random.default_rng(0).normal(size=shape)
    gradient = scale * np.cos(x)
    place = ["x[2, ...]", "x[:, 2, ...]", "x[:, :, 2]"][axis]
    check = check_gradient(f, gradient, x)
    check.raise_if_failed()
    np.moveaxis(gradient, axis, 0)[2] *= factor
    check = check_gradient(f, gradient, x)
    assert check.verdict == "wrong"
    assert place in {row.input for row in check.rows if row.verdict == "wrong"}


@pytest.mark.parametrize("share", [1e-4, 1e-8])
@pytest.mark.parametrize("at_fault", ["dx", "gamma", "beta"])
def test_a_wrong_sign_in_a_small_channel_of_a_layer_is_found(share, at_fault):
    class Wrong(BatchNorm):
        def backward(self, dy):
            dx = super().backward(dy)
            where = {"dx": dx[:, 1:2], "gamma": self.grad_gamma[1:2], "beta": self.grad_beta[1:2]}[at_fault]
            where *= -1
            return dx

    for layer in (BatchNorm(3, dtype=np.float64), Wrong(3, dtype=np.float64)):
        layer.gamma[1] = share if at_fault == "dx" else 1
        x = np.random.default_rng(1).normal(3, 2, (6, 3, 4))
        if at_fault != "dx":  # whose output has a small part in what comes after
            layer = Chain(layer, Scaled(np.array([1, share, 1])[:, None]))
        found = check_layer(layer, x)
        assert found.verdict == ("wrong" if isinstance(layer, Wrong) or "Wrong" in str(layer.__dict__) else "ok")


class Scaled(ReLU):
    """y = scale * x"""

    def __init__(self, scale):
        self.scale = scale

    def forward(self, x):
        return self.scale * x

    def backward(self, dy):
        return self.scale * dy


def test_parts_of_ordinary_data_there_are_none():
    check = check_gradient(log_sum_exp, softmax, X)
    assert {row.input for row in check.rows} == {"x"}
    assert len(check.rows) == 8


def test_many_small_entries_are_one_part():
    x = np.ones(40)
    x[5:] = 1e-6
    check = check_gradient(lambda x: np.sum(x**2), lambda x: 2 * x, x)
    check.raise_if_failed()
    assert {row.input for row in check.rows} == {"x", "x[5 and 34 more]"}


def test_advice_fits_the_dtype():
    def rough(x):
        return np.sum(np.sin(1e9 * x))

    for dtype, there in ((np.float32, True), (np.float64, False)):
        check = check_gradient(rough, np.ones(3), np.array([0.3, 0.7, 2.0], dtype))
        assert check.verdict == "inconclusive"
        assert ("use float64" in check.summary) == there


# --- how layers say what their gradients are -----------------------------------------------------------------------


class Sums:
    """A linear layer that adds up its gradients, as PyTorch's do; `hidden`: gradients() gives copies of them."""

    hidden = read_only = False
    sign = 1

    def __init__(self):
        self.w = np.random.default_rng(3).normal(size=(3, 2))
        self.total = np.zeros((3, 2))

    def forward(self, x):
        self.x = x
        return x @ self.w

    def backward(self, dy):
        self.total = self.total + self.sign * (self.x.T @ dy)
        return dy @ self.w.T

    def parameters(self):
        return {"w": self.w}

    def gradients(self):
        return {"w": self.total.copy() if self.hidden else self.total}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backwards", [0, 1, 5])
def test_a_layer_that_adds_up_its_gradients(hidden, sign, backwards):
    layer = Sums()
    layer.hidden, layer.sign = hidden, sign
    for _ in range(backwards):
        layer.backward(np.ones_like(layer.forward(X)))
    before = layer.total.copy()
    check = check_layer(layer, X)
    assert check.verdict == ("ok" if sign == 1 else "wrong")
    assert {row.input for row in check.rows if row.verdict == "wrong"} == ({"w"} if sign == -1 else set())
    np.testing.assert_array_equal(layer.total, before)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_layer_that_sets_its_gradients_and_has_run_before(hidden, sign):
    class Sets(Sums):
        def backward(self, dy):
            self.total = self.sign * (self.x.T @ dy)
            return dy @ self.w.T

    layer = Sets()
    layer.hidden, layer.sign = hidden, sign
    layer.forward(X)
    layer.backward(np.ones((4, 2)))
    assert check_layer(layer, X).verdict == ("ok" if sign == 1 else "wrong")


class Returns(Plain):
    """Linear, whose backward gives (dx, dw, db), as in course notes."""

    def __init__(self):
        self.w, self.b = np.random.default_rng(3).normal(size=(3, 2)), np.zeros(2)

    def forward(self, x):
        self.x = x
        return x @ self.w + self.b

    def backward(self, dy):
        return dy @ self.w.T, self.x.T @ dy, dy.sum(0)

    def parameters(self):
        return {"w": self.w, "b": self.b}


def test_gradients_that_backward_returns_are_those_of_the_parameters_in_order():
    check = check_layer(Returns(), X)
    check.raise_if_failed()
    assert {row.input for row in check.rows} == {"x", "w", "b"}
    for wrong in range(3):
        bad = variant(
            Returns,
            backward=lambda s, dy, i=wrong: tuple(
                g * (1 - 2 * (i == j)) for j, g in enumerate(Returns.backward(s, dy))
            ),
        )
        check = check_layer(bad, X)
        assert {row.input for row in check.rows if row.verdict == "wrong"} == {["x", "w", "b"][wrong]}


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (
            variant(Returns, parameters=None),
            TypeError,
            r"expected dx of backward, got a tuple of 3; gradients of param",
        ),
        (variant(Returns, gradients=lambda s: {}), TypeError, r"expected dx of backward, got a tuple of 3; gradients"),
        (
            variant(Returns, backward=lambda s, dy: Returns.backward(s, dy)[:2]),
            ValueError,
            r"expected 2 gradients after dx of backward, those of \['w', 'b'\], got 1",
        ),
        (variant(Returns, backward=lambda s, dy: {"dx": dy}), TypeError, "expected dx of backward, got dict"),
        (variant(Plain, backward=lambda s, dy: (2 * s.x * dy, 1.0)), TypeError, "expected dx of backward, got a tuple"),
        (
            variant(Sums, parameters=lambda s: {"w": 0.5}),
            TypeError,
            r"parameters\(\)\['w'\]: expected the numpy.ndarray that forward reads, got float",
        ),
        (
            variant(Sums, gradients=lambda s: {"w": None}),
            TypeError,
            r"gradients\(\)\['w'\]: expected an array, got None",
        ),
    ],
)
def test_what_a_layer_says_otherwise_is_refused_in_words(layer, error, words):
    with pytest.raises(error, match=words):
        check_layer(layer, X)
