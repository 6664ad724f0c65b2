"""Choosing heads and settings on pictures that no result is reported on."""
