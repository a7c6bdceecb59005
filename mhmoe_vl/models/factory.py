"""Encoders and classifiers by configuration, by name, and from what a run saved."""

from __future__ import annotations
