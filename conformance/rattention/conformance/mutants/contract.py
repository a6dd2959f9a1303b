"""Breaches of the contract around the numbers: validation, layout of inputs and outputs, and what describe() says."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from rattention.conformance.mutants.port import Port, plant
from rattention.spec import Result, SpecError, Unsupported

# ---------------------------------------------------------------------------------------------------- bad input


class Lenient(Port):
    """Answers calls that break `clause` with zeros instead of refusing them."""

    clause = ""

    def run(self, op, tensors, attrs):
        try:
            return super().run(op, tensors, attrs)
        except SpecError as error:
            if error.clause != self.clause:
                raise
            like = next((np.asarray(t) for t in tensors.values() if t is not None), np.zeros(1))
            return Result({"out": np.zeros(like.shape, np.float32)}, path="eager", kernels=[])


_ACCEPTS = {
    "ERR-1": "Missing and unknown tensors are accepted.",
    "ERR-2": "Tensors of a wrong rank are accepted.",
    "ERR-3": "Shapes that contradict each other are accepted.",
    "ERR-4": "Wrong and mixed dtypes are accepted.",
    "ERR-5": "Attributes outside their domain are accepted.",
    "ERR-6": "Any ratio of heads is accepted.",
    "ERR-7": "Half a rotary table, or positions without one, is accepted.",
    "ERR-8": "Torn and negative segments are accepted.",
    "ERR-9": "Positions outside the rotary table are accepted.",
    "ERR-10": "lengths out of range are accepted.",
    "ERR-11": "cache_length out of range is accepted.",
}
for _clause, _title in _ACCEPTS.items():
    _cls = type(f"Accepts{_clause.replace('-', '')}", (Lenient,), {"__doc__": _title, "clause": _clause})
    plant(_clause, "bad input", "rationale: a check that was never written")(_cls)


@plant("BCK-5", "bad input", "rationale: an error of the framework's own")
class RefusesWithValueError(Port):
    """Bad input raises a plain ValueError."""

    def check(self, op, tensors, attrs):
        try:
            return super().check(op, tensors, attrs)
        except SpecError as error:
            raise ValueError(str(error)) from None


@plant("BCK-5", "bad input", "rationale: a validation of its own")
class RefusesInItsOwnWords(Port):
    """Bad input raises a SpecError that blames the first tensor."""

    def check(self, op, tensors, attrs):
        try:
            return super().check(op, tensors, attrs)
        except SpecError as error:
            raise SpecError(op, next(iter(tensors), "q"), error.expected, error.got, error.clause) from None


@plant("ERR-5", "bad input", "rationale: True is an int")
class WindowTrueIsOne(Port):
    """A boolean window is read as a number."""

    def check(self, op, tensors, attrs):
        if isinstance(attrs.get("window"), bool):
            attrs = {**attrs, "window": int(attrs["window"])}
        return super().check(op, tensors, attrs)

    def run(self, op, tensors, attrs):
        return super().run(op, tensors, attrs)


@plant("ERR-12", "bad input", "TRAPS 12: zero-length sequences")
class NoTokensCrash(Port):
    """T = 0 raises."""

    def compute(self, call, tensors):
        if call.dims.get("T") == 0:
            raise IndexError("index 0 is out of bounds for axis 1 with size 0")
        return super().compute(call, tensors)


@plant("ERR-12", "bad input", "TRAPS 12")
class NoRowsCrash(Port):
    """B = 0 raises."""

    def compute(self, call, tensors):
        if call.dims.get("B") == 0:
            raise ZeroDivisionError("integer division or modulo by zero")
        return super().compute(call, tensors)


@plant("ERR-12 SEG-8 RLA-6", "bad input", "TRAPS 12: an early return")
class NoTokensLoseTheState(Port):
    """T = 0 returns a state of zeros."""

    def compute(self, call, tensors):
        outputs = super().compute(call, tensors)
        if call.dims.get("T") == 0:
            for name in ("final_state", "cache_state"):
                if name in outputs:
                    outputs[name] = np.zeros_like(outputs[name])
        return outputs


@plant("ERR-13", "contract", "TRAPS 15: buffers reused")
class InputsScaledInPlace(Port):
    """q is multiplied by the scale in place where it can be written to."""

    def compute(self, call, tensors):
        outputs = super().compute(call, tensors)
        q = tensors.get("q")
        if q is not None and q.flags.writeable and q.size and call.dims["D"] > 1:
            q *= q.dtype.type(0.5)
        return outputs


@plant("ERR-13", "contract", "TRAPS 15")
class StateUpdatedInPlace(Port):
    """cache_state is updated in place and returned."""

    def run(self, op, tensors, attrs):
        outputs = super().run(op, tensors, attrs)
        state = tensors.get("cache_state")
        if op == "rattention_extend" and state is not None and state.flags.writeable:
            state[...] = outputs["cache_state"]
        return outputs


@plant("ERR-13", "contract", "rationale: attributes taken out of the caller's dict with pop")
class AttributesPopped(Port):
    """The default of `scale` is written into the caller's attributes, and `eps` taken out of them."""

    def run(self, op, tensors: Any, attrs: Any):
        outputs = super().run(op, tensors, attrs)
        attrs.pop("eps", None)
        if "scale" in attrs and attrs["scale"] is None:
            attrs["scale"] = tensors["q"].shape[3] ** -0.5
        return outputs


@plant("ERR-13", "contract", "rationale: optional tensors filled in where they were absent")
class TensorsFilledIn(Port):
    """An absent initial state is added to the caller's tensors, as zeros."""

    def run(self, op, tensors: Any, attrs: Any):
        outputs = super().run(op, tensors, attrs)
        if "final_state" in outputs and tensors.get("initial_state") is None:
            tensors["initial_state"] = np.zeros_like(outputs["final_state"])
        return outputs


@plant("ERR-13", "contract", "rationale: an identity that returns its argument")
class OutputAliasesInput(Port):
    """The identity map returns x itself, and an unchanged state is the caller's own array."""

    def run(self, op, tensors, attrs):
        outputs = super().run(op, tensors, attrs)
        if op == "feature_map" and attrs.get("feature_map") == "identity":
            outputs["out"] = np.asarray(tensors["x"])
        state = tensors.get("initial_state")
        if state is not None and attrs.get("window", 0) is None and "final_state" in outputs:
            outputs["final_state"] = np.asarray(state)
        return outputs


# ---------------------------------------------------------------------------------------------------- layout


@plant("NUM-7", "contract", "TRAPS 13: strides ignored")
class StridesIgnored(Port):
    """A transposed or sliced input is read in the order of its memory."""

    def compute(self, call, tensors):
        read = {n: t if t.flags.c_contiguous else t.ravel(order="K").reshape(t.shape) for n, t in tensors.items()}
        return super().compute(call, read)


@plant("NUM-7", "contract", "TRAPS 13: expanded cotangents")
class BroadcastsRefused(Port):
    """An input with a stride of zero raises."""

    def compute(self, call, tensors):
        for name, t in tensors.items():
            if any(step == 0 and size > 1 for step, size in zip(t.strides, t.shape, strict=True)):
                raise RuntimeError(f"{name} is not contiguous")
        return super().compute(call, tensors)


@plant("NUM-7", "contract", "TRAPS 13")
class ReadOnlyRefused(Port):
    """A read-only input raises."""

    def compute(self, call, tensors):
        for name, t in tensors.items():
            if not t.flags.writeable:
                raise ValueError(f"{name}: buffer source array is read-only")
        return super().compute(call, tensors)


# ---------------------------------------------------------------------------------------------------- outputs


@plant("NUM-1", "gross", "TRAPS 23: tolerances that pass an all-zero output")
class AlwaysZero(Port):
    """Every output is zero."""

    def compute(self, call, tensors):
        return {name: np.zeros_like(t) for name, t in super().compute(call, tensors).items()}


@plant("NUM-1", "gross", "TRAPS 23: NaN that compares as equal")
class AlwaysNan(Port):
    """Every floating-point output is NaN."""

    def compute(self, call, tensors):
        outputs = super().compute(call, tensors)
        return {n: np.full_like(t, np.nan) if n != "cache_length" else t for n, t in outputs.items()}


@plant("NUM-1", "gross", "TRAPS 23")
class OnePercentOff(Port):
    """`out` is one percent too large."""

    def compute(self, call, tensors):
        outputs = super().compute(call, tensors)
        return {n: t * np.float32(1.01) if n == "out" else t for n, t in outputs.items()}


@plant("NUM-1 NUM-2", "one dtype", "TRAPS 23: small and everywhere")
class OnePartInTenThousand(Port):
    """In float32 calls `out` is 1e-4 too large."""

    def compute(self, call, tensors):
        outputs = super().compute(call, tensors)
        factor = np.float32(1.0001 if call.storage == "float32" else 1)
        return {n: t * factor if n == "out" else t for n, t in outputs.items()}


@plant("NUM-1", "gross", "TRAPS 11: an element never written")
class LastElementNotWritten(Port):
    """The very last element of `out` is zero."""

    def compute(self, call, tensors):
        outputs = super().compute(call, tensors)
        if "out" in outputs and outputs["out"].size:
            outputs["out"] = np.array(outputs["out"])
            outputs["out"].reshape(-1)[-1] = 0
        return outputs


@plant("BCK-2", "contract", "rationale: the public function's extra")
class ExtraOutput(Port):
    """Results carry one more array."""

    def run(self, op, tensors, attrs):
        outputs = super().run(op, tensors, attrs)
        outputs["lse"] = np.zeros(1, np.float32)
        return outputs


@plant("BCK-2", "contract", "rationale: an output nobody asks for")
class FinalStateMissing(Port):
    """final_state is not returned."""

    def run(self, op, tensors, attrs):
        outputs = super().run(op, tensors, attrs)
        outputs.pop("final_state", None)
        return outputs


@plant("BCK-2", "one dtype", "rationale: float32 handed back for 16-bit storage")
class OutputInFloat32(Port):
    """`out` is float32 whatever the storage."""

    def run(self, op, tensors, attrs):
        outputs = super().run(op, tensors, attrs)
        if "out" in outputs:
            outputs["out"] = outputs["out"].astype(np.float32)
        return outputs


@plant("BCK-2", "contract", "rationale: heads before tokens")
class OutputHeadsFirst(Port):
    """`out` comes as [B, H, T, X]."""

    def run(self, op, tensors, attrs):
        outputs = super().run(op, tensors, attrs)
        if "out" in outputs and outputs["out"].ndim == 4:
            outputs["out"] = outputs["out"].swapaxes(1, 2)
        return outputs


@plant("GRAD-6", "contract", "rationale: every gradient returned whether asked or not")
class GradientsOfAbsentInputs(Port):
    """op.vjp also returns d_initial_state where no initial_state was given."""

    def run(self, op, tensors, attrs):
        outputs = super().run(op, tensors, attrs)
        if op in ("rattention.vjp", "residual_linear_attention.vjp") and "d_initial_state" not in outputs:
            outputs["d_initial_state"] = np.zeros(1, np.float32)
        return outputs


# ---------------------------------------------------------------------------------------------------- declarations


@plant("BCK-1", "lie", "rationale: a key nobody filled in")
class DescribesTooLittle(Port):
    """describe() lacks its list of dtypes."""

    def describe(self):
        about = super().describe()
        del about["dtypes"]
        return about


@plant("BCK-1", "lie", "rationale: written for another version")
class AnotherSpecVersion(Port):
    """describe() names a version of the spec that this suite does not test."""

    def describe(self):
        return {**super().describe(), "spec_version": "0.0.1"}


@plant("BCK-3", "lie", "TRAPS 30: declared, not run")
class DeclaresMoreThanItRuns(Port):
    """Every gradient is declared and refused."""

    def run(self, op, tensors, attrs):
        if op.endswith(".vjp"):
            raise Unsupported("no gradients yet")
        return super().run(op, tensors, attrs)


@plant("BCK-3", "lie", "TRAPS 30")
class DeclaredDtypeRefused(Port):
    """float16 is declared and refused."""

    def run(self, op, tensors, attrs):
        if any(np.asarray(t).dtype == np.float16 for t in tensors.values() if t is not None):
            self.check(op, tensors, attrs)
            raise Unsupported("float16")
        return super().run(op, tensors, attrs)


@plant("BCK-3", "lie", "TRAPS 30")
class RefusesWithTheWrongError(Port):
    """A cache is not supported, and NotImplementedError says so."""

    def run(self, op, tensors, attrs):
        if op.startswith("rattention_extend"):
            raise NotImplementedError
        return super().run(op, tensors, attrs)


@plant("BCK-4", "lie", "TRAPS 30: silent fallback counted as conformance")
class ClaimsAKernel(Port):
    """describe() claims a kernel, each run takes the eager path."""

    def describe(self):
        return {**super().describe(), "kernels": ["fused_forward"]}


@plant("BCK-4", "past size", "TRAPS 30")
class FallsBackOnLongRows(Port):
    """A kernel is claimed and named, except where T is past 64."""

    def describe(self):
        return {**super().describe(), "kernels": ["fused_forward"]}

    def run(self, op, tensors, attrs):
        outputs = super().run(op, tensors, attrs)
        T = np.shape(tensors.get("q", tensors.get("x", np.zeros((1, 0)))))[1]
        assert isinstance(outputs, Result)
        outputs.metadata.update({"path": "fused", "kernels": ["fused_forward"]} if T <= 64 else {})
        return outputs


@plant("NUM-4", "contract", "TRAPS 15: autotuning that changes the result")
class FirstCallDiffers(Port):
    """Every other call sums in another order, which shows in the last bits."""

    def __init__(self):
        self.calls = itertools.count()

    def compute(self, call, tensors):
        outputs = super().compute(call, tensors)
        if next(self.calls) % 2 and "out" in outputs and call.storage == "float32":
            outputs["out"] = np.nextafter(outputs["out"].astype(np.float32), np.float32(np.inf))
        return outputs
