"""A model that hallucinates on purpose: scenes, captions, training and evaluation of a tiny vision-language model."""
