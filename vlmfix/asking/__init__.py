"""How one asks: the one API above the engine.

`Asker` is a model, its processor and methods, ready to be asked; everything above (command line, evaluation, demo)
stands on it. A question becomes a `Batch` (the processor's output and how to generate), perhaps one that continues from
a `Prefix`, and comes back as a `Record`.
"""
