"""Tests of one body in two lengths: a short one that always runs, a long one that `pytest -m campaign` runs."""

import pytest


def short_and_long(short, long):
    """Values for `parametrize`: the first for every run, the second for campaigns."""
    return [pytest.param(short, id="short"), pytest.param(long, id="long", marks=pytest.mark.campaign)]
