"""The encoder, what is built on it, visual tokenizers, and published checkpoints."""
