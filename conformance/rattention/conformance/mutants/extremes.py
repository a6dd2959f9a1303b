"""Faults at the far ends of sizes: windows past narrow integers, tables, batches and heads past what was thought of."""

from __future__ import annotations

import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant


def _wrapped(bits: int):
    """The window as a signed integer of so many bits would hold it."""

    def near_window(self):
        w = Form.near_window(self)
        return w if w == np.inf else (w + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)

    return near_window


for _bits in (16, 32):
    _title = f"The softmax window is an integer of {_bits} bits, and wraps."
    _methods = {"__doc__": _title, "near_window": _wrapped(_bits)}
    plant("SWA-6 SWA-1", "past size", "rationale: a narrow integer in a kernel's parameters")(
        type(f"WindowOf{_bits}Bits", (Form,), _methods)
    )


@plant("RLA-1 RLA-6", "past size", "rationale: a narrow integer in a kernel's parameters")
class FarWindowOf16Bits(Form):
    """The window of the linear branch is an integer of 16 bits, and wraps."""

    def far_window(self):
        w = super().far_window()
        return w if w == np.inf else (w + 2**15) % 2**16 - 2**15


@plant("EXT-8 ROPE-3", "decode only", "rationale: a table made for 4096 tokens")
class DecodeTableEndsAt4096(Form):
    """In a continuation, positions past 4095 take row 4095 of the rotary table."""

    def make_plan(self):
        plan = super().make_plan()
        if self.op == "rattention_extend":
            plan.rope_row = np.minimum(plan.rope_row, 4095)
        return plan


@plant("ROPE-4", "past size", "rationale: positions held in 16 bits")
class PositionsOf16Bits(Form):
    """Positions given are read as unsigned integers of 15 bits."""

    def make_plan(self):
        plan = super().make_plan()
        if "positions" in self.tensors:
            plan.rope_row = plan.rope_row % 2**15
        return plan


@plant("SEG-7 RLA-6", "packed only", "rationale: the last document ends where its padding does")
class PaddingBehindEndsTheState(Form):
    """The final state is empty where two or more tokens of padding stand behind the last document."""

    def folds(self):
        folds, live = super().folds(), self.plan.live
        if self.op == "rattention_extend" or live.shape[1] < 2:
            return folds
        return folds & np.any(live[:, -2:], 1)[:, None]


def _row_of(rows: int):
    """Outputs of row b of the batch are those of row b mod `rows`."""

    def run(self):
        outputs = Form.run(self)
        B = self.dims["B"]
        batched = {o.name for o in self.call.operation.outputs if o.shape[:1] == ("B",)}
        return {n: x[np.arange(B) % rows] if n in batched and rows < B else x for n, x in outputs.items()}

    return run


plant("NUM-6", "past size", "rationale: a grid of sixteen rows")(
    type(
        "RowsPastSixteenRepeat",
        (Form,),
        {"__doc__": "Row b of a batch past 16 is answered as row b mod 16.", "run": _row_of(16)},
    )
)


@plant("SWA-4 RLA-8", "heads", "rationale: a table of eight heads")
class HeadsPastEightRepeat(Form):
    """Key/value heads from the eighth on give the outputs of the head eight before them."""

    def run(self):
        outputs = super().run()
        heads, G = self.dims.get("Hkv", 0), self.dims.get("Hq", 0) // max(self.dims.get("Hkv", 0), 1)
        if heads > 8 and "out" in outputs:
            head = np.arange(heads * G)
            outputs["out"] = outputs["out"][:, :, np.where(head // G >= 8, head - 8 * G, head)]
        return outputs
