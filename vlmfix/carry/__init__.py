"""A fixed model outside of this library: gains folded into weights, adapters for other engines, and their check."""
