"""What a method is: stages, settings, registry, head lists. Knows no engine."""
