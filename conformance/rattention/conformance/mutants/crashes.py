"""Calls that end in an exception which is no refusal: an assertion, a table without an entry, a buffer of one size."""

from __future__ import annotations

from rattention.conformance.mutants.port import Port, plant


@plant("BCK-3 BCK-1", "crash", "rationale: kernels are looked up by dtype, and nobody compiled one of them")
class CrashesOnFloat16Gradients(Port):
    """Gradients in float16 end in a KeyError."""

    def check(self, op, tensors, attrs):
        call = super().check(op, tensors, attrs)
        kernels = {"float32": "backward_f32", "bfloat16": "backward_bf16"}
        if op.endswith(".vjp"):
            kernels[call.storage]
        return call


@plant("BCK-3", "crash", "rationale: kernels are compiled for the group sizes of known models")
class CrashesOnGroupsOfThree(Port):
    """Three query heads per kv head fail an assertion."""

    def check(self, op, tensors, attrs):
        call = super().check(op, tensors, attrs)
        dims = call.dims
        assert dims.get("Hkv", 0) == 0 or dims["Hq"] != 3 * dims["Hkv"], "no kernel for groups of 3"
        return call


@plant("BCK-3 EXT-2", "crash", "rationale: a workspace of the size that the author's prompts had")
class CrashesOnLongExtensions(Port):
    """An extension by more than 12 tokens overruns its workspace."""

    def check(self, op, tensors, attrs):
        call = super().check(op, tensors, attrs)
        if op.startswith("rattention_extend"):
            workspace = memoryview(bytearray(12))
            workspace[max(call.dims["T"], 1) - 1] = 1
        return call


@plant("BCK-3", "crash", "rationale: a tile is loaded before it is known to be there")
class CrashesOnWindowsPastTheEnd(Port):
    """A window longer than the sequence ends in an IndexError."""

    def check(self, op, tensors, attrs):
        call = super().check(op, tensors, attrs)
        window, T = call.attributes.get("window"), call.dims.get("T", 0)
        if op == "rattention" and window is not None and window > T > 0:
            raise IndexError(f"tile {window} of a sequence of {T}")
        return call
