"""Helpers shared by several parts of the package."""
