"""StandardScaler, bnfast's and scikit-learn's. To compare the two use `python benchmarks/scaler.py`: two processes."""

import functools

import numpy as np
import pytest
from scaler import CASES, CONTENDERS, OPERATIONS, calls, data, scaler_of

import bnfast
from bnfast.commands.bench.compare import machine


@functools.lru_cache(maxsize=1)
def arrays(case):
    return data(case)


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return request.param


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_scaler(benchmark, case, operation, contender):
    try:
        scaler = scaler_of(contender)
    except ImportError:
        pytest.skip(f"{contender} is not installed")
    x = arrays(case)
    call = calls(scaler, x)[operation]
    benchmark.group = f"{operation} {case}"
    benchmark.extra_info.update(machine(), contender=contender, threads=bnfast.get_num_threads(), bytes=x.nbytes)
    benchmark(call)
    rows = x[:1000].astype(np.float64)
    np.testing.assert_allclose(scaler.transform(rows), (rows - scaler.mean_) / scaler.scale_, rtol=1e-12, atol=1e-12)
