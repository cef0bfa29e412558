"""A subclass that pickles of 0.1.0 name (tests/fixtures/pickles-0.1.0)."""

import bnfast


class Named(bnfast.BatchNorm):
    """A layer with a name of its own."""

    label = "subclass"
