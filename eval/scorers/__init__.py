"""From answers to counts, and from counts to figures."""
