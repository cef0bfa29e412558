"""What is wrong with a saved state: one exception for all of it."""

__all__ = ["StateError"]


class StateError(ValueError):
    """A state (a dictionary, a pickle) does not fit the layer, or is damaged. The layer is unchanged."""
