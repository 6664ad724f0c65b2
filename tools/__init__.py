"""What keeps the README true, and figures of the code itself."""
