"""Jevons: a small team's own DeepSeek, from one recipe file to a model one can talk to."""

__version__ = "0.1.0"
