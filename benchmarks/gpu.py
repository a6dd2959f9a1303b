"""The Triton kernels on a GPU: agreement, determinism, time and memory, beside what they replace. `make gpu`.

    python benchmarks/gpu.py [--minutes 8] [--quick] [--out benchmarks/results/gpu.json]
    python benchmarks/gpu.py --dry-run --out FILE        every line on the CPU, interpreted: nothing is measured

Needs torch with a CUDA or ROCm device and triton. In one run, on one device, it

1. compiles what follows, in several processes at once: Triton's and Inductor's caches on disk carry it over;
2. measures the device: copy bandwidth and bfloat16 matmul rate (the roofline that shares refer to);
3. compares the kernels with the eager form in the timed configuration and reruns it 30 times: equal bit for bit;
4. times forward and forward + backward with CUDA events against FlexAttention with a window of 4096 and of 512, full
   causal scaled_dot_product_attention and the unfused compositions of gpu_rivals.py, with peak memory;
5. times decoding in place at batch 1 to 256 against the bytes of ring and state;
6. compares and reruns every other configuration.

Steps stop when the time is up; what was measured is written as JSON with a plot beside it. Exit status 1 where the
kernels disagree or are not deterministic, 2 without a device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_device import DEVICE, DRY, ROOT, SHAPE, Clock, inputs, milliseconds, normal, peak_bytes, reason, roofline

import torch  # isort: skip  # after gpu_device, which decides for the interpreter before triton is imported
import triton
from gpu_counts import least
from gpu_plot import plot
from gpu_rivals import compositions, flex, full_causal
from provenance import commit
from rattention.torch.eager.operations import EAGER
from rattention.torch.triton import Ring, operations, step
from rattention.torch.triton.config import config_for, device_kind
from torch import Tensor

ATTRIBUTES: dict[str, Any] = {"window": SHAPE.window, "scale": None, "feature_map": "softmax", "eps": 1e-6}
BOUNDS = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2}
"""Relative error (Frobenius norm) to the eager form in float32 that agreement allows: a sign of life. The judge of
numerics is `rattention conform`."""
CASES = [("bfloat16", 128, 100), ("bfloat16", 64, 100), ("bfloat16", 128, -1), ("float16", 128, 100),
         ("float32", 64, 100), ("bfloat16", 256, 100), ("float16", 64, 100), ("float32", 128, 100),
         ("bfloat16", 80, 100), ("float16", 256, 100), ("float32", 256, 100)]  # fmt: skip
LENGTHS, BATCHES = (8192, 2048, 32768, 65536), (64, 1, 16, 256, 4, 128)
if DRY:
    CASES, LENGTHS, BATCHES = [("float32", 16, 10)], (64,), (2,)


def values_and_gradients(implementation: Any, x: dict[str, Tensor], attributes: dict[str, Any]) -> list[Tensor]:
    leaves = {n: t.detach().clone().requires_grad_(not n.startswith("rope")) for n, t in x.items()}
    out, state = implementation["rattention"](**leaves, **attributes)
    wanted = [t for t in leaves.values() if t.requires_grad]
    loss = (out.float() * normal(*out.shape, dtype=torch.float32, seed=8)).sum() + 0.01 * state.sum()
    return [out.detach(), state.detach(), *torch.autograd.grad(loss, wanted)]


def agreement(dtype: str, D: int, window: int, reruns: int) -> dict[str, Any]:
    """Error to the eager form, and bit-equality of reruns. T divides by 16 as the timed lengths do, so that the same
    programs run, and by no larger tile."""
    attributes = {**ATTRIBUTES, "window": window}
    T, Hq, Hkv = (48, 4, 1) if DRY else (784, 8, 2)
    x = inputs(2, T, getattr(torch, dtype), D, Hq, Hkv)
    entry: dict[str, Any] = {"dtype": dtype, "D": D, "window": window}
    try:
        exact = values_and_gradients(EAGER, {n: t.float() for n, t in x.items()}, attributes)
        got = values_and_gradients(operations, x, attributes)
        pairs = zip(got, exact, strict=True)
        errors = [((g.float() - e).norm() / e.norm().clamp_min(1e-20)).item() for g, e in pairs]
        entry |= {"worst_relative_error": max(errors), "agrees": max(errors) <= BOUNDS[dtype]}
        again = (values_and_gradients(operations, x, attributes) for _ in range(reruns - 1))
        entry["reruns"] = reruns
        entry["reruns_equal"] = all(torch.equal(a, b) for r in again for a, b in zip(r, got, strict=True))
    except Exception as error:
        entry |= {"agrees": False, "error": reason(error)}
    print(f"  {entry}", flush=True)
    return entry


# ---------------------------------------------------------------------------------------------------- prefill


def candidates(T: int) -> tuple[int, dict[str, tuple[Callable[[], Any], Callable[[], Any]]]]:
    """B, and for each candidate its forward and its forward + backward on a batch of B rows of T tokens."""
    B = max(1, SHAPE.tokens // T)
    x = inputs(B, T, torch.bfloat16, SHAPE.D, SHAPE.Hq, SHAPE.Hkv)
    train = {n: t.detach().requires_grad_(not n.startswith("rope")) for n, t in x.items()}
    leaves = [t for t in train.values() if t.requires_grad]
    q, k, v = (x[n].transpose(1, 2).contiguous() for n in "qkv")
    first = [t.detach().requires_grad_() for t in (q, k, v)]
    d = normal(B, T, SHAPE.Hq, SHAPE.D, seed=9)
    d_first = d.transpose(1, 2).contiguous()

    def ours(t: dict[str, Tensor]) -> Tensor:
        return operations["rattention"](**t, **ATTRIBUTES)[0]

    def whole(run: Callable[[dict[str, Tensor]], Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        return lambda: run(x), lambda: torch.autograd.grad(run(train), leaves, d)

    def attention(run: Callable[..., Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        return lambda: run(q, k, v), lambda: torch.autograd.grad(run(*first), first, d_first)

    found = {"rattention": whole(ours)}
    for total in (SHAPE.wide, SHAPE.window + 1):
        found[f"flex {total}"] = attention(flex(total, T))
    found["sdpa causal"] = attention(full_causal)
    return B, found | {name: whole(run) for name, run in compositions(T).items()}


def prefill(T: int, clock: Clock, rates: dict[str, Any]) -> dict[str, Any]:
    B, runs = candidates(T)
    result: dict[str, Any] = {"B": B, "T": T, "ms": {}, "host_ms": {}, "peak_bytes": {}}
    for name, (once, both) in runs.items():
        if clock.left() < 20:
            break
        with torch.no_grad():
            forward = milliseconds(once, clock)
        training = milliseconds(both, clock)
        result["ms"][name] = {"forward": forward, "forward_backward": training}
        if training is not None:
            began = time.perf_counter()
            both()
            result["host_ms"][name] = 1e3 * (time.perf_counter() - began)
            result["peak_bytes"][name] = peak_bytes(both)
        print(f"  T {T}: {name}: {forward} ms, {training} ms", flush=True)
    own = result["ms"].get("rattention", {})
    keys = [k for k in ("forward", "forward_backward") if own.get(k)]
    rivals = {name: t for name, t in result["ms"].items() if name != "rattention"}
    result["speedup"] = {name: {k: t[k] / own[k] for k in keys if t.get(k)} for name, t in rivals.items()}
    result["share_of_roofline"] = {k: share(B * T * SHAPE.Hq, own[k], k, rates) for k in keys}
    return result


def share(rows: int, ms: float, what: str, rates: dict[str, Any]) -> dict[str, float]:
    """Least time of `rows` (token, query head) pairs by operations and by bytes, over the measured one."""
    found = {}
    for name, rate in (("operations", "matmul_ops_per_s"), ("memory", "copy_bytes_per_s")):
        per_row = least(SHAPE.window, SHAPE.Hq // SHAPE.Hkv, SHAPE.D, SHAPE.D)
        parts = ["forward"] if what == "forward" else ["forward", "backward"]
        if rates.get(rate):
            found[name] = 1e3 * rows * sum(per_row[p][name] for p in parts) / rates[rate] / ms
    return found


# ---------------------------------------------------------------------------------------------------- decode


def decode(batch: int, clock: Clock, rates: dict[str, Any]) -> dict[str, Any]:
    """Time of one step of one layer: a graph of several layers, each with a ring and state of its own, so that none is
    in the cache from the step before."""
    W, Hkv, D = SHAPE.window, SHAPE.Hkv, SHAPE.D
    moved = batch * Hkv * (W * 2 * D * 2 + 2 * 2 * D * D * 4)
    layers = 2 if DRY else max(4, min(64, (256 << 20) // moved))
    x = inputs(1, 4096 if DRY else 16384, torch.bfloat16, D, SHAPE.Hq, Hkv)
    rings = [
        Ring(
            normal(batch, W + 1, Hkv, D), normal(batch, W + 1, Hkv, D, seed=1),
            normal(batch, Hkv, 2 * D, D, dtype=torch.float32),
            torch.full((batch,), 3000, dtype=torch.int32, device=DEVICE),
        )
        for _ in range(layers)
    ]  # fmt: skip
    q, k, v = normal(batch, 1, SHAPE.Hq, D), normal(batch, 1, Hkv, D), normal(batch, 1, Hkv, D)
    extra: dict[str, Any] = {n: x[n] for n in ("rope_cos", "rope_sin", "q_scale", "k_scale")}

    def run() -> None:
        for ring in rings:
            step(ring, q, k, v, x["swa_weight"], x["rla_weight"], window=W, **extra)

    run()
    replay: Callable[[], Any] = run
    if not DRY:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    ms = milliseconds(replay, clock)
    rate = rates.get("copy_bytes_per_s")
    entry = {"batch": batch, "ms": ms and ms / layers, "bytes": moved, "layers": layers}
    entry["share_of_copy"] = moved / (entry["ms"] / 1e3) / rate if ms and rate else None
    print(f"  decode {entry}", flush=True)
    return entry


# ---------------------------------------------------------------------------------------------------- order of work


def warm(what: str) -> None:
    """Run one part once, so that it is compiled."""
    kind, *rest = what.split(":")
    if kind == "case":
        agreement(rest[0], int(rest[1]), int(rest[2]), 1)
    elif kind == "prefill":
        for once, both in candidates(int(rest[0]))[1].values():
            with torch.no_grad():
                once()
            both()
    else:
        decode(int(rest[0]), Clock(0), {})


def warm_all(quick: bool, seconds: float) -> float:
    """All parts, each in a process of its own, a few at a time. Returns the seconds taken."""
    began = time.monotonic()
    cases, lengths = (CASES[:3], LENGTHS[:1]) if quick else (CASES, LENGTHS)
    parts = [f"prefill:{T}" for T in lengths] + [f"case:{d}:{D}:{w}" for d, D, w in cases]
    parts += [f"decode:{b}" for b in BATCHES[: 1 if quick else None]]
    memory = torch.cuda.get_device_properties(DEVICE).total_memory
    slots = max(1, min((os.cpu_count() or 2) // 2, memory // (8 << 30), 8))
    running: list[subprocess.Popen[bytes]] = []
    while (parts or running) and time.monotonic() - began < seconds:
        running = [p for p in running if p.poll() is None]
        while parts and len(running) < slots:
            command = [sys.executable, __file__, "--warm", parts.pop(0)]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(0.2)
    for process in running:
        process.kill()
        process.wait()
    return time.monotonic() - began


def targets(report: dict[str, Any]) -> dict[str, Any]:
    """What DESIGN asks for: the number reached, where measured, beside it."""
    speedup = next((r["speedup"] for r in report["prefill"] if r["T"] == LENGTHS[0]), {})
    wide, apart = speedup.get(f"flex {SHAPE.wide}", {}), speedup.get("unfused", {})
    found = {
        f"forward over flex {SHAPE.wide}": (3.0, wide.get("forward")),
        f"forward + backward over flex {SHAPE.wide}": (2.5, wide.get("forward_backward")),
        "forward over unfused": (2.5, apart.get("forward")),
        "forward + backward over unfused": (2.5, apart.get("forward_backward")),
        "decode, share of copy": (0.75, next((r["share_of_copy"] for r in report["decode"] if r["batch"] == 64), None)),
    }
    return {n: {"target": t, "reached": x, "met": None if x is None else x >= t} for n, (t, x) in found.items()}


def measure(report: dict[str, Any], clock: Clock, quick: bool, write: Callable[[], None]) -> None:
    reruns = 2 if DRY else 5 if quick else 30
    report["roofline"] = roofline(clock)
    print(report["device"], report["roofline"], flush=True)
    report["agreement"].append(agreement(*CASES[0], reruns))
    write()
    for i in range(max(len(LENGTHS), len(BATCHES))):
        if quick and i:
            break
        if i < len(LENGTHS) and clock.left() > 40:
            report["prefill"].append(prefill(LENGTHS[i], clock, report["roofline"]))
        if i < len(BATCHES) and clock.left() > 15:
            report["decode"].append(decode(BATCHES[i], clock, report["roofline"]))
        write()
    for case in CASES[1 : 3 if quick else None]:
        if clock.left() > 15:
            report["agreement"].append(agreement(*case, reruns))
            write()


def main() -> int:
    parser = argparse.ArgumentParser(description="Agreement, determinism and speed of the Triton kernels on this GPU.")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--quick", action="store_true", help="one shape, few reruns")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, tiny: measures nothing")
    parser.add_argument("--check", action="store_true", help="say whether a device is here and do nothing else")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/gpu.json")
    options = parser.parse_args()
    if DRY and options.out is None:
        parser.error("--dry-run needs --out: what it writes are no results")
    if not DRY and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA or ROCm device here, nothing was measured", file=sys.stderr)
        return 2
    if options.check:
        return 0
    if options.warm:
        warm(options.warm)
        return 0
    clock = Clock(options.minutes)
    out = options.out or ROOT / "benchmarks/results/gpu.json"
    kind = device_kind(DEVICE)
    report: dict[str, Any] = {
        "dry_run": DRY, "commit": commit(), "device": "none" if DRY else torch.cuda.get_device_name(), "kind": kind,
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "hip": torch.version.hip,
        "config": str(config_for(kind, SHAPE.D, SHAPE.D, torch.bfloat16)),
        "shape": {"Hq": SHAPE.Hq, "Hkv": SHAPE.Hkv, "D": SHAPE.D, "window": SHAPE.window, "dtype": "bfloat16"},
        "agreement": [], "prefill": [], "decode": [],
    }  # fmt: skip

    def write() -> None:
        report["targets"] = targets(report)
        report["seconds_left"] = clock.left()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    if not DRY:
        report["compile_seconds"] = warm_all(options.quick, 0.35 * 60 * options.minutes)
    measure(report, clock, options.quick, write)
    report["prefill"].sort(key=lambda r: r["T"])
    report["decode"].sort(key=lambda r: r["batch"])
    write()
    plot(report, out.with_suffix(".png"))
    for name, x in report["targets"].items():
        print(f"{name}: {x['reached']}, target {x['target']}")
    bad = [r for r in report["agreement"] if not r["agrees"] or not r.get("reruns_equal")]
    print(f"written to {out}; {len(bad)} of {len(report['agreement'])} configurations disagree or are unstable")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
