"""RAttention in NumPy: the reference that defines the semantics, in float64.

The functions compute in the recurrent form; `quadratic.run` and `recurrent.run` give either form unrounded, and
`budget.evaluate` the values with the error that an implementation may have.
"""

from rattention.numpy.functions import (
    Cache,
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
