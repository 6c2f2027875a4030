"""The arithmetic and the bookkeeping behind AWP."""
