"""Derivatives by differences, and the check of a backward pass."""
