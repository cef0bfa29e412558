"""How many threads a call may use, and what was built."""
