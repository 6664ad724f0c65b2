"""Asking a benchmark's questions, and what is left on disk."""
