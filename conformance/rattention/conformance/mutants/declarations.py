"""Descriptions that do not say what the port does, refusals at the wrong time, and attributes taken for others."""

from __future__ import annotations

from typing import Any

import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import Port, plant
from rattention.spec import SpecError, Unsupported, load

# ---------------------------------------------------------------------------------------------------- names


@plant("BCK-1", "lie", "TRAPS 41: a misspelt capability")
class CapabilityMisspelt(Port):
    """The capability "segments" is listed as "segment"."""

    def describe(self):
        about = super().describe()
        return about | {"capabilities": ["segment" if c == "segments" else c for c in about["capabilities"]]}


@plant("BCK-1", "lie", "TRAPS 41: a capability of one's own")
class CapabilityUnknown(Port):
    """A capability is listed that the specification does not know."""

    def describe(self):
        about = super().describe()
        return about | {"capabilities": [*about["capabilities"], "softcap"]}


@plant("BCK-1", "lie", "TRAPS 41")
class OperationMisspelt(Port):
    """The gradient of rattention is listed as rattention_vjp."""

    def describe(self):
        about = super().describe()
        return about | {"operations": [op.replace("rattention.vjp", "rattention_vjp") for op in about["operations"]]}


@plant("BCK-1", "lie", "rationale: a capability forgotten")
class CacheNotListed(Port):
    """rattention_extend is listed, and the capability that each call of it needs is not."""

    def describe(self):
        about = super().describe()
        return about | {"capabilities": [c for c in about["capabilities"] if c != "cache"]}


@plant("BCK-1", "lie", "rationale: the name of a size in the port's own code")
class LimitOfNothing(Port):
    """A limit is set on `head_size`, which is no dimension."""

    def describe(self):
        return super().describe() | {"limits": {"head_size": 256}}


# ---------------------------------------------------------------------------------------------------- undeclared


class Partial(Port):
    """Declares less than the eager form has; `refuses` says whether a call that needs more is refused."""

    without: frozenset[str] = frozenset()
    """Names that are not declared: operations, dtypes, capabilities."""

    def describe(self):
        about = super().describe()
        return about | {
            key: [x for x in about[key] if x not in self.without] for key in ("operations", "dtypes", "capabilities")
        }

    def run(self, op, tensors, attrs):
        call = self.check(op, tensors, attrs)
        lacking = self.without & ({op, call.storage} | load().needs(op, call.given))
        if lacking and self.refuses(lacking):
            raise Unsupported(f"no {', '.join(sorted(lacking))}")
        return super().run(op, tensors, attrs)

    def refuses(self, lacking: frozenset[str] | set[str]) -> bool:
        return False


@plant("BCK-3", "lie", "TRAPS 41: what runs without being declared")
class UndeclaredOptionRuns(Partial):
    """`memory` is not listed, and calls with one run."""

    without = frozenset({"memory"})


@plant("BCK-3", "lie", "TRAPS 41")
class UndeclaredPositionsRun(Partial):
    """`positions` is not listed, and calls with them run."""

    without = frozenset({"positions"})


@plant("BCK-3", "lie", "TRAPS 30: a tensor that nobody reads")
class UndeclaredOptionIgnored(Partial):
    """`lengths` is not listed, and calls with them run as if they were absent."""

    without = frozenset({"lengths"})

    def compute(self, call, tensors):
        return super().compute(call, {n: t for n, t in tensors.items() if n != "lengths"})


@plant("BCK-3", "lie", "TRAPS 41")
class UndeclaredDtypeRuns(Partial):
    """float16 is not listed, and calls in it run."""

    without = frozenset({"float16"})


@plant("BCK-3", "lie", "TRAPS 41")
class UndeclaredOperationRuns(Partial):
    """The gradient of rms_mix is not listed, and it runs."""

    without = frozenset({"rms_mix.vjp"})


@plant("BCK-3", "lie", "TRAPS 30: a fallback past what the kernels take")
class LimitNotKept(Port):
    """A largest D of 8 is declared, and larger ones run."""

    def describe(self):
        return super().describe() | {"limits": {"D": 8}}


@plant("BCK-3", "lie", "rationale: an error of its own for what is not there yet")
class UndeclaredOptionCrashes(Partial):
    """`initial_state` is not listed, and calls with one end in a NotImplementedError."""

    without = frozenset({"initial_state"})

    def refuses(self, lacking):
        raise NotImplementedError("not there yet")


# ---------------------------------------------------------------------------------------------------- refusals, outputs


@plant("BCK-5", "bad input", "rationale: the dtype is looked up before the call is checked")
class UnsupportedForNoStorageDtype(Port):
    """float64 and integer data are Unsupported, though no call can have them."""

    def run(self, op, tensors, attrs):
        known = (*load().storage_dtypes, "int32")
        for t in load().operations[op].tensors if op in load().operations else ():
            x = tensors.get(t.name)
            if x is not None and (str(x.dtype) not in known or (t.dtype == "storage" and x.dtype == np.int32)):
                raise Unsupported(f"{t.name} in {x.dtype}")
        return super().run(op, tensors, attrs)


@plant("BCK-2", "contract", "TRAPS 9: masks that hide elements from the comparison")
class OutputsMasked(Port):
    """`out` is a NumPy masked array with its NaN masked away."""

    def run(self, op, tensors, attrs):
        outputs = super().run(op, tensors, attrs)
        if "out" in outputs:
            with np.errstate(invalid="ignore"):
                outputs["out"] = np.ma.masked_where(np.isnan(outputs["out"].astype(np.float32)), outputs["out"])
        return outputs


# ---------------------------------------------------------------------------------------------------- attributes


class Rounds(Port):
    """Numbers beyond float32 are rounded to it before the call is checked, in place of being refused."""

    attribute = ""

    def check(self, op, tensors: Any, attrs: Any):
        try:
            return super().check(op, tensors, attrs)
        except SpecError as error:
            value = attrs.get(self.attribute)
            if error.argument != self.attribute or not isinstance(value, float) or value != value:
                raise
            with np.errstate(all="ignore"):
                held = float(np.float32(value))
            if np.isinf(value) or (held == 0 and value == 0) or (value < 0 and self.attribute != "scale"):
                raise
            near = min(max(abs(held), 2.0**-126), 2.0**127)
            return super().check(op, tensors, {**attrs, self.attribute: float(np.copysign(near, held))})


@plant("ERR-5", "bad input", "rationale: a range check that only asks for a finite float64")
class ScaleBeyondFloat32(Rounds):
    """A scale of 1e39 or 1e-50 is accepted."""

    attribute = "scale"


@plant("ERR-5", "bad input", "rationale: eps > 0 is asked of float64, and float32 makes 0 of it")
class EpsBeyondFloat32(Rounds):
    """An eps of 1e-50 or 1e-40 is accepted."""

    attribute = "eps"


@plant("ERR-5", "bad input", "rationale: the table is computed in float64 anyway")
class ThetaBeyondFloat32(Rounds):
    """A theta of 1e39 is accepted."""

    attribute = "theta"


@plant("SWA-2", "structured data", "rationale: scalars passed to a kernel as half")
class ScaleInHalf(Form):
    """The scale is rounded to float16, where great ones are clamped and small ones vanish."""

    def make_scale(self):
        scale = super().make_scale()
        if -1e4 <= scale <= 1e4 and (scale == 0 or abs(scale) >= 1e-4):
            return scale
        return float(np.float16(np.clip(scale, -65504, 65504)))


@plant("MIX-2", "structured data", "rationale: a guard against division by zero")
class EpsClamped(Form):
    """eps is at least 1e-12."""

    def norm(self, x):
        kept = self.attrs["eps"]
        self.attrs["eps"] = max(kept, 1e-12)
        try:
            return super().norm(x)
        finally:
            self.attrs["eps"] = kept


@plant("FM-6", "nan", "rationale: the derivative of torch.relu, which selects with x <= 0")
class ReluPassesAtNan(Form):
    """The cotangent passes the relu of a NaN as if it were positive."""

    def phi_vjp(self, x, d):
        out = super().phi_vjp(x, d)
        if self.attrs["feature_map"] != "relu":
            return out
        half = d.shape[-1] // 2
        return np.where(np.isnan(x), d[..., :half] - d[..., half:], out)


@plant("NUM-7", "contract", "TRAPS 13: from_numpy of a view with a negative stride")
class NegativeStridesRefused(Port):
    """An axis of one element with a negative stride raises; longer ones are copied first."""

    def compute(self, call, tensors):
        for name, t in tensors.items():
            if any(step < 0 and size == 1 for step, size in zip(t.strides, t.shape, strict=True)):
                raise ValueError(f"{name}: at least one stride is negative")
        return super().compute(call, tensors)
