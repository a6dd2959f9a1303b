"""Ports in other languages: JSON lines on stdin and stdout, tensors in safetensors files (chapter 12)."""

from rattention.conformance.wire.client import Port

__all__ = ["Port"]
