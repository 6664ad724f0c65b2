"""What a model is: its parts, what its keys are, how it is loaded. Knows no methods."""
