"""Calls into a backend, each one watched: what every call must keep is checked on every call of every property."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.description import names
from rattention.conformance.judge import Violation, compare
from rattention.conformance.oracle import Bounds, Oracle, half_ulp
from rattention.conformance.strategies import Plan
from rattention.conformance.strategies.plan import outside
from rattention.conformance.told import by_user, clause_of, crash, reason_of, shown, told, trace
from rattention.spec import UNREAD, Call, Result, SpecError, Unsupported, load, validate

STORAGE = ("float32", "bfloat16", "float16")


class Refused(Exception):
    """The backend said Unsupported and was entitled to: the case ends without a verdict."""


class Moot(Exception):
    """Nothing that the backend could have answered would be wrong: the case is no test of anything, and not counted."""


class Broken(Exception):
    """A violation after which the case cannot go on."""


class PortFailure(Exception):
    """A port of another language crashed, hung or answered garbage; raised by the wire client (WIRE-3).

    `clause` is the rule of the protocol that it broke.
    """

    def __init__(self, text: str, clause: str = "WIRE-3"):
        super().__init__(text)
        self.clause = clause

    @property
    def kind(self) -> str:
        """Of the violation: an answer that breaks the protocol is no crash."""
        return "crash" if self.clause in ("WIRE-3", "BCK-3") else "structure"


class Context:
    """A backend, its description, the oracle, and what was seen so far.

    `violations` collects what the watch around each call finds; `shares` holds the largest share of the budget used,
    by (operation, dtype, output). `held` are the clauses that the watch has held calls against.
    """

    def __init__(self, backend: Any, describe: Mapping[str, Any], plan: Plan, oracle: Oracle | None = None):
        self.backend = backend
        self.describe = describe
        self.plan = plan
        self.oracle = oracle or Oracle()
        self.violations: list[Violation] = []
        self.shares: dict[tuple[str, str, str], float] = {}
        self.calls = 0
        self.held: set[str] = set()
        self._kept: list[tuple[str, np.ndarray, np.ndarray]] = []

    # ------------------------------------------------------------------------------------------ calls

    def run(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A valid call, watched.

        Raises:
            Refused: Unsupported, with every right to it.
            Broken: no usable answer; the violation is in `violations`.
        """
        before = {name: np.array(x, copy=True, order="K") for name, x in tensors.items()}
        self.calls += 1
        try:
            result = self.call(op, getattr(tensors, "whole", tensors), attrs)
        except Unsupported as refusal:
            self._unsupported(op, tensors, attrs, refusal)
            raise Refused(told(refusal)) from None
        except SpecError as error:
            self._break(("BCK-5", *clause_of(error)), f"a valid call was refused: {told(error)}", "refusal")
        except PortFailure as failure:
            self._break(tuple(dict.fromkeys((failure.clause, "BCK-3"))), str(failure), failure.kind)
        except BaseException as error:  # a backend may fail in any way it likes, SystemExit included
            if by_user(error):
                raise
            beyond = self.entitled(op, tensors, attrs)
            expected = f"{beyond}: expected Unsupported; " if beyond else ""
            self._break(("BCK-3",), f"{expected}{op} raised {crash(error)}", "crash", trace(error))
        finally:
            self._unmodified(op, tensors, before)
        call = validate(op, tensors, attrs, host=UNREAD)
        beyond = self._beyond(call)
        if beyond:
            self._break(("BCK-3", "BCK-1"), f"{op} ran although it is not declared: {beyond}", "refusal")
        outputs = self._structure(call, tensors, result)
        self._memory(op, tensors, outputs)
        self.held |= {"BCK-2", "BCK-3", "ERR-13"}
        return outputs

    def call(self, op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
        """The backend alone, on mappings of its own: what it does to them is a fault (ERR-13) and ends there."""
        lent: tuple[dict[str, Any], dict[str, Any]] = (dict(tensors), dict(attrs))
        try:
            return self.backend.run(op, *lent)
        finally:
            for what, given, now in (("tensor", tensors, lent[0]), ("attribute", attrs, lent[1])):
                for name in sorted(given.keys() | now.keys(), key=told):
                    if name not in given or name not in now or given[name] is not now[name]:
                        how = "removed" if name not in now else "replaced" if name in given else "added"
                        message = f"{op} {how} the {what} {told(name)} in the caller's mapping"
                        self.violations.append(Violation(("ERR-13",), message, "mutation", told(name)))

    def run_raw(self, op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """As `run`, for a call that names absent tensors as None."""
        return self.run(op, _Given(tensors), attrs)

    def _break(self, clauses: tuple[str, ...], message: str, kind: str, trace: str = "") -> None:
        self.violations.append(Violation(clauses, message, kind, trace=trace))
        raise Broken(message)

    def _unsupported(
        self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any], refusal: Unsupported
    ) -> None:
        """BCK-3: what is declared runs, and a refusal has a reason."""
        entitled = self.entitled(op, tensors, attrs)
        if not reason_of(refusal):
            self.violations.append(Violation(("BCK-3",), f"{op}: Unsupported without a reason", "refusal"))
        if not entitled:
            message = f"{op}: declared, and refused all the same: Unsupported({told(refusal)})"
            self._break(("BCK-3", "BCK-1"), message, "refusal")

    def entitled(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> str:
        """Why the backend may answer Unsupported to this valid call, or "" where its description promises the call."""
        return self._beyond(validate(op, tensors, attrs, host=UNREAD))

    def _beyond(self, call: Call) -> str:
        about, op = self.describe, call.operation.name
        if op not in names(about, "operations"):
            return f"operation {op} is not declared"
        if call.storage not in names(about, "dtypes"):
            return f"dtype {call.storage} is not declared"
        lacking = load().needs(op, call.given) - set(names(about, "capabilities"))
        if lacking:
            return "capability not declared: " + ", ".join(sorted(lacking))
        limits = about.get("limits")
        for name, bound in (limits if isinstance(limits, Mapping) else {}).items():
            value = call.dims.get(name, call.attributes.get(name))
            if name in call.dims or name in call.attributes:
                reason = outside(name, value, bound)
                if reason:
                    return reason
        return ""

    def _structure(self, call: Call, tensors: Mapping[str, np.ndarray], result: Any) -> dict[str, np.ndarray]:
        """BCK-2, GRAD-6 and BCK-4: names, shapes, dtypes, and the path taken. The outputs, in a dict of our own."""
        op = call.operation.name
        label = ("GRAD-6", "BCK-2") if call.operation.is_vjp else ("BCK-2",)
        outputs: dict[str, np.ndarray] = {}
        try:
            mapping = isinstance(result, Mapping)
            outputs = dict(result) if mapping else {}
        except BaseException as error:  # a mapping of a class of the backend's own may fail like the call itself
            if by_user(error):
                raise
            message = f"{op} returned {type(result).__name__}, which cannot be read: {crash(error)}"
            self._break(label, message, "structure", trace(error))
        if not mapping:
            self._break(label, f"{op} returned {type(result).__name__}, not a mapping of outputs", "structure")
        shapes = call.output_shapes()
        dtypes = call.output_dtypes({k: str(v.dtype) for k, v in tensors.items()})
        if set(outputs) != set(shapes):
            got = f"[{', '.join(sorted(map(shown, outputs)))}]"  # anything hashable may be among them
            self._break(label, f"{op} returned {got}, expected {sorted(shapes)}", "structure")
        for name, shape in shapes.items():
            x = outputs[name]
            # No subclass: a mask, say, hides elements from every comparison.
            if type(x) is not np.ndarray:
                self._break(label, f"{op}: {name} is {type(x).__name__}, not a NumPy array", "structure")
            if x.shape != shape or str(x.dtype) != dtypes[name]:
                got, want = f"{x.dtype}{list(x.shape)}", f"{dtypes[name]}{list(shape)}"
                self._break(label, f"{op}: {name} is {got}, expected {want}", "structure")
        claimed = self.describe.get("kernels")
        if claimed and str(op) in names(self.describe, "operations"):
            self._kernels(op, call.dims, result, claimed)
        return outputs

    def _kernels(self, op: str, dims: Mapping[str, int], result: Any, claimed: Any) -> None:
        metadata = result.metadata if isinstance(result, Result) else {}
        metadata = metadata if isinstance(metadata, dict) else {}
        named = metadata.get("kernels")
        launched = [told(k) for k in named] if isinstance(named, list | tuple | set) else []
        empty = 0 in [dims.get(size, 1) for size in (("M",) if str(op).startswith("rope_table") else ("B", "T"))]
        path = told(metadata.get("path", ""))
        if empty:
            return
        self.held.add("BCK-4")
        if not launched or path in ("", "eager", "xla", "fallback"):
            self.violations.append(
                Violation(
                    ("BCK-4",), f"{op}: kernels are claimed, and the run took path {path!r} with {launched}", "law"
                )
            )
        declared = [told(c) for c in claimed] if isinstance(claimed, list | tuple) else []
        unknown = [k for k in launched if not any(k.startswith(c) for c in declared)]
        if unknown:
            self.violations.append(Violation(("BCK-4", "BCK-1"), f"{op}: ran kernels not declared: {unknown}", "law"))

    def _unmodified(self, op: str, tensors: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> None:
        for name, copy in before.items():
            now = tensors.get(name)
            if now is None or now.shape != copy.shape or now.dtype != copy.dtype or now.tobytes() != copy.tobytes():
                self.violations.append(Violation(("ERR-13",), f"{op} modified its input {name}", "mutation", name))

    def _memory(self, op: str, tensors: Mapping[str, np.ndarray], result: Mapping[str, np.ndarray]) -> None:
        """ERR-13: no output lives in an input's memory, nor is one changed by a later call."""
        for name, x in result.items():
            for other, y in tensors.items():
                if x.size and np.may_share_memory(x, y):
                    message = f"{op}: output {name} shares memory with input {other}"
                    self.violations.append(Violation(("ERR-13",), message, "mutation", name))
        for earlier, array, copy in self._kept:
            if array.tobytes() != copy.tobytes():
                message = f"{op} changed {earlier}, an output of an earlier call"
                self.violations.append(Violation(("ERR-13",), message, "mutation"))
        self._kept = [(f"{op}: {name}", x, x.copy()) for name, x in result.items() if x.nbytes < 2**16]

    # ------------------------------------------------------------------------------------------ judgements

    def bounds(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Bounds:
        """Reference values and budgets of a call."""
        return self.oracle.evaluate(op, tensors, attrs)

    def tight(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Bounds:
        """Bounds for a call whose operands are exact in its storage dtype (see `Oracle.exact`)."""
        call = validate(op, tensors, attrs, host=UNREAD)
        storage = tensors[next(t.name for t in call.operation.tensors if t.dtype == "storage")].dtype
        dtypes = call.output_dtypes({k: str(v.dtype) for k, v in tensors.items()})
        wide = self.oracle.exact(op, tensors, attrs, storage)
        return {
            name: (value, budget + half_ulp(np.abs(value) + budget, np.dtype(storage)))
            if dtypes[name] == str(storage)
            else (value, budget)
            for name, (value, budget) in wide.items()
        }

    def judge(
        self,
        case: Case,
        got: Mapping[str, np.ndarray],
        bounds: Bounds,
        clauses: tuple[str, ...],
        *,
        live: Mapping[str, np.ndarray] | None = None,
        record: bool = True,
    ) -> list[Violation]:
        """Compare, and remember the share of the budget that was used."""
        found, shares = compare(got, bounds, clauses, live=live)
        if record:
            dtype = storage_of(case)
            for name, share in shares.items():
                key = (case.op, dtype, name)
                self.shares[key] = max(self.shares.get(key, 0.0), share)
        return found


class _Given(dict[str, np.ndarray]):
    """Tensors of a call with absent ones as None: the watch sees the present ones, the backend sees all."""

    def __init__(self, tensors: Mapping[str, Any]):
        super().__init__({n: x for n, x in tensors.items() if x is not None})
        self.whole = dict(tensors)


def storage_of(case: Case) -> str:
    """The storage dtype of a call; float32 where no tensor has the class."""
    for t in load().operations[case.op].tensors:
        if t.dtype == "storage" and t.name in case.tensors:
            return str(case.tensors[t.name].dtype)
    return "float32"
