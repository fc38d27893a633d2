"""Nearest-code search: one entry point, `nearest_code`, and its backends."""
