"""Gradients against central differences of the forward pass, in float64.

dy is random: the gradient of sum(y) is zero whatever x is, and a check with dy = ones sees nothing.
"""

import numpy as np
import pytest

from bnfast import check_gradient
from bnfast import functional as F

RTOL, ATOL = 1e-6, 1e-8  # TRUST.md A10; the differences themselves are good to 1e-9
STEP = 1e-5  # error of a central difference: STEP^2 from the cubic term, 2^-53 / STEP from rounding
EPS = 1e-5

SHAPES = [(7, 3), (6, 3, 4), (4, 2, 3, 3), (2, 3, 2, 1, 3), (1, 2, 20)]


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def data(request, make_data, layout):
    return make_data(request.param, np.float64).placed(layout)


def check_gradients(forward, gradients, dy, *arguments):
    """The gradients of (dy * forward(x, gamma, beta)).sum() with respect to x, gamma, beta."""
    for i, gradient in enumerate(gradients):

        def loss(moved, i=i):
            return (dy * forward(*arguments[:i], moved, *arguments[i + 1 :])).sum()

        check_gradient(loss, gradient, arguments[i], rtol=RTOL).raise_if_failed()


def test_backward_is_the_gradient_of_training(data, isa, layout):
    x, dy, _, gamma, beta, *_ = data
    _, mean, inv_std = F.batch_norm(x, gamma, beta, axis=layout.axis, eps=EPS)
    gradients = F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=layout.axis)
    check_gradients(lambda *args: F.batch_norm(*args, axis=layout.axis, eps=EPS)[0], gradients, dy, x, gamma, beta)


def test_backward_is_the_gradient_of_eval(data, isa, layout):
    x, dy, _, gamma, beta, mean, logarithm = data
    var = np.exp(logarithm)
    inv_std = 1 / np.sqrt(var + EPS)
    gradients = F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=layout.axis, training=False)
    check_gradients(
        lambda x, *parameters: F.batch_norm_eval(x, mean, var, *parameters, axis=layout.axis, eps=EPS),
        gradients, dy, x, gamma, beta,
    )  # fmt: skip


def test_jvp_is_the_derivative_along_a_direction(data, isa, layout):
    x, _, v, gamma, beta, vgamma, vbeta = data

    def forward(t):
        return F.batch_norm(x + t * v, gamma + t * vgamma, beta + t * vbeta, axis=layout.axis, eps=EPS)

    _, mean, inv_std = forward(0.0)
    jvp = F.batch_norm_jvp(v, x, mean, inv_std, gamma, axis=layout.axis, vgamma=vgamma, vbeta=vbeta)
    numerical = (forward(STEP)[0] - forward(-STEP)[0]) / (2 * STEP)
    np.testing.assert_allclose(jvp, numerical, rtol=RTOL, atol=ATOL)


def test_what_normalisation_removes_has_no_gradient(data, layout):
    """A shift of all dy, or dy along x_hat (up to eps): what the statistics take away again."""
    x, axis = data.x, layout.axis
    x_hat, mean, inv_std = F.batch_norm(x, axis=axis, eps=1e-300)
    for dy in (np.ones_like(x), x_hat):
        dx = F.batch_norm_backward(dy, x, mean, inv_std, axis=axis)[0]
        np.testing.assert_allclose(dx, 0, atol=ATOL * inv_std.max())
