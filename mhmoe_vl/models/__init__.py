"""Encoders, heads, tokenizers and detectors, and how they are made, loaded and converted."""
