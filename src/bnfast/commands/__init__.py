"""What `python -m bnfast` runs."""
