"""How a method comes on: passes, hooks, attention, state, second streams."""
