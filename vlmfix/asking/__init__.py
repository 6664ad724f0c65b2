"""How one asks: the one API above the engine."""
