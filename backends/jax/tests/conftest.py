"""Tests compile some hundred small programs and run each once or twice: the machine code need not be fast.

The passes over the program, which decide its arithmetic, are untouched. JAX reads the flag when it first meets a
device, which is after collection.
"""

import os

FLAG = "--xla_backend_optimization_level=0"

if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
