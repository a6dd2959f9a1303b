"""The eager form: chunked, linear in T, on any device; what a CPU user runs.

It is built from three kernels that see only flat heads, `[N, ...]` with N = B * Hkv: `band` (softmax over a window),
`scan` (linear attention with a carried state) and the maps around them in plain PyTorch. `operations` composes them
into the operations of the specification.
"""
