"""An OpenAI-compatible server: every method behind the interface that chat programs and evaluation harnesses speak."""
