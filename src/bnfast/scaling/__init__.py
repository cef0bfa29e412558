"""Feature scaling as scikit-learn does it."""
