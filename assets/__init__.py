"""Data files: each folder says what it holds, where it comes from and under which licence."""
