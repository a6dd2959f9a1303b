"""The plot of benchmarks/gpu.py: time per token of prefill and training, share of the copy bandwidth in decoding."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def plot(report: dict[str, Any], path: Path) -> bool:
    """Draw what `report` has; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    names = list(dict.fromkeys(n for r in report["prefill"] for n in r["ms"]))
    for axis, key in zip(axes, ("forward", "forward_backward"), strict=False):
        for name in names:
            at = [(r["T"], r["ms"].get(name, {}).get(key), r["B"]) for r in report["prefill"]]
            points = [(T, 1e6 * ms / (B * T)) for T, ms, B in at if ms]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="T", ylabel="ns per token", title=key.replace("_", " + "))
        if axis.lines:
            axis.legend()
    points = [(r["batch"], 100 * r["share_of_copy"]) for r in report["decode"] if r["share_of_copy"]]
    if points:
        axes[2].plot(*zip(*points, strict=True), marker="o")
    axes[2].axhline(75, linestyle="--", color="grey")
    axes[2].set(xscale="log", xlabel="batch", ylabel="% of copy bandwidth", title="decode", ylim=(0, 105))
    figure.suptitle(report["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
