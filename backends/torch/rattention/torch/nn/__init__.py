"""Layers (see `layer`)."""
