"""RAttention for PyTorch: a chunked eager form for any device and fused Triton kernels for GPUs.

    from rattention.torch import rattention

The functions are those of the specification, under its names; `rattention.torch.nn` holds the layer.
"""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ModuleNotFoundError("rattention.torch needs PyTorch: install rattention with its extra torch", name="torch")

from rattention.torch.cache import Cache
from rattention.torch.functions import (
    feature_map,
    rattention,
    rattention_extend,
    residual_linear_attention,
    rms_mix,
    rope_table,
    sliding_window_attention,
)

__all__ = [
    "Cache",
    "feature_map",
    "rattention",
    "rattention_extend",
    "residual_linear_attention",
    "rms_mix",
    "rope_table",
    "sliding_window_attention",
]
