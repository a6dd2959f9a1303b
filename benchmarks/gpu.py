"""The Triton kernels on a GPU: agreement, determinism, time and memory, beside what they replace. `make gpu`.

    PYTHONPATH=spec:backends/torch python benchmarks/gpu.py [--minutes 8] [--quick] [--out benchmarks/results/gpu.json]

Needs torch with a CUDA or ROCm device and triton; nothing else of this repository but the roots above. In one run, on
one device, it

1. measures the device: copy bandwidth and bfloat16 matmul rate (the roofline that shares refer to);
2. compares the kernels with the eager form, all operations and gradients, and reruns each configuration 30 times:
   the results must be equal bit for bit;
3. times forward and forward + backward with CUDA events against FlexAttention with a window of 4096 and of 512,
   full causal scaled_dot_product_attention, and the unfused composition: FlexAttention 512, a chunked linear-attention
   kernel (flash-linear-attention where installed, else our own linear branch alone), feature maps and norms in eager
   PyTorch;
4. times decoding in place at batch 1 to 256 against the bytes of ring and state.

Steps stop when the time is up; what was measured is written as JSON with a plot beside it. Exit status 1 where the
kernels disagree or are not deterministic.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from rattention.torch.eager.operations import EAGER
from rattention.torch.triton import Ring, operations, step
from rattention.torch.triton.config import config_for, device_kind
from torch import Tensor

DEVICE = torch.device("cuda")
HQ, HKV, D, WINDOW = 16, 4, 128, 511
ATTRIBUTES: dict[str, Any] = {"window": WINDOW, "scale": None, "feature_map": "softmax", "eps": 1e-6}


class Clock:
    """Seconds left of the budget."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic()


def milliseconds(run: Callable[[], Any], clock: Clock, repeats: int = 20) -> float | None:
    """Median of CUDA-event timings, the cache flushed between runs; None where it fails or the time is up."""
    if clock.left() < 5:
        return None
    try:
        run()
        torch.cuda.synchronize()
        began = time.monotonic()
        run()
        torch.cuda.synchronize()
        repeats = max(3, min(repeats, int(2.0 / max(time.monotonic() - began, 1e-5))))
        flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
        pairs = []
        for _ in range(repeats):
            flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairs)
    except Exception as error:  # a competitor that does not run here is reported, not hidden
        print(f"    failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
        torch.cuda.synchronize()
        return None


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Bytes allocated at the peak of `run`, beyond those held before it."""
    try:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    except Exception:
        return None


# ---------------------------------------------------------------------------------------------------- inputs


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def inputs(
    B: int, T: int, dtype: torch.dtype = torch.bfloat16, D: int = D, Hq: int = HQ, Hkv: int = HKV
) -> dict[str, Tensor]:
    angle = torch.arange(T, device=DEVICE)[:, None] * 1e4 ** (-torch.arange(0, D, 2, device=DEVICE) / D)
    return {
        "q": normal(B, T, Hq, D, dtype=dtype, seed=1),
        "k": normal(B, T, Hkv, D, dtype=dtype, seed=2),
        "v": normal(B, T, Hkv, D, dtype=dtype, seed=3),
        "swa_weight": 1 + 0.1 * normal(Hq, D, dtype=torch.float32, seed=4),
        "rla_weight": 1 + 0.1 * normal(Hq, D, dtype=torch.float32, seed=5),
        "rope_cos": angle.cos(),
        "rope_sin": angle.sin(),
        "q_scale": 1 + 0.1 * normal(D, dtype=torch.float32, seed=6),
        "k_scale": 1 + 0.1 * normal(D, dtype=torch.float32, seed=7),
    }


# ---------------------------------------------------------------------------------------------------- 1. device


def roofline(clock: Clock) -> dict[str, Any]:
    """Copy bandwidth in bytes/s (read + written) and dense bfloat16 matmul rate in operations/s."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = normal(8192, 8192), normal(8192, 8192, seed=1)
    copy = milliseconds(lambda: target.copy_(source), clock)
    matmul = milliseconds(lambda: a @ b, clock)
    return {
        "copy_bytes_per_s": 2 * source.numel() / (copy / 1e3) if copy else None,
        "matmul_ops_per_s": 2 * 8192**3 / (matmul / 1e3) if matmul else None,
    }


# ---------------------------------------------------------------------------------------------------- 2. agreement


def values_and_gradients(implementation: Any, x: dict[str, Tensor], attributes: dict[str, Any]) -> list[Tensor]:
    leaves = {n: t.detach().clone().requires_grad_(not n.startswith("rope")) for n, t in x.items()}
    out, state = implementation["rattention"](**leaves, **attributes)
    wanted = [t for t in leaves.values() if t.requires_grad]
    loss = (out.float() * normal(*out.shape, dtype=torch.float32, seed=8)).sum() + 0.01 * state.sum()
    return [out.detach(), state.detach(), *torch.autograd.grad(loss, wanted)]


def agreement(clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """Relative error (Frobenius norm) to the eager form in float32, and bit-equality of 30 reruns."""
    cases = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float16, 64),
             (torch.float32, 128), (torch.float16, 128), (torch.bfloat16, 256), (torch.float32, 256),
             (torch.bfloat16, 80)]  # fmt: skip
    bounds = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
    rows = []
    for dtype, dim in cases[: 3 if quick else None]:
        for window in (100, -1) if dim == 64 else (100,):
            if clock.left() < 60:
                return rows
            attributes = {**ATTRIBUTES, "window": window}
            x = inputs(2, 777, dtype, dim, 4, 2)
            exact = values_and_gradients(EAGER, {n: t.float() for n, t in x.items()}, attributes)
            entry: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "D": dim, "window": window}
            try:
                got = values_and_gradients(operations, x, attributes)
                pairs = zip(got, exact, strict=True)
                errors = [((g.float() - e).norm() / e.norm().clamp_min(1e-20)).item() for g, e in pairs]
                entry |= {"worst_relative_error": max(errors), "agrees": max(errors) <= bounds[dtype]}
                again = [values_and_gradients(operations, x, attributes) for _ in range(4 if quick else 29)]
                entry["reruns_equal"] = all(torch.equal(a, b) for r in again for a, b in zip(r, got, strict=True))
            except Exception as error:
                entry |= {"agrees": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            print(f"  {entry}", flush=True)
            rows.append(entry)
    return rows


# ---------------------------------------------------------------------------------------------------- 3. prefill


def heads_first(x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x[n].transpose(1, 2).contiguous() for n in "qkv")  # type: ignore[return-value]


def flex(window: int, T: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q >= kv) & (q - kv < window)

    block = create_block_mask(mask, None, None, T, T, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block, enable_gqa=True)  # type: ignore[return-value]


def full_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def linear_kernel() -> tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """A chunked linear-attention kernel on features: [B, T, H, F], [B, T, H, F], [B, T, H, Dv]."""
    if importlib.util.find_spec("fla") is not None:
        from fla.ops.linear_attn import chunk_linear_attn  # pyright: ignore[reportMissingImports]

        def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            G = q.shape[2] // k.shape[2]
            k, v = k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)
            return chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]

        return "flash-linear-attention", chunked

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return operations["residual_linear_attention"](q, k, v, window=-1, feature_map="identity")[0]

    return "own linear branch alone", own


def unfused(T: int) -> tuple[str, Callable[[dict[str, Tensor]], Tensor]]:
    name, linear = linear_kernel()
    window = flex(WINDOW + 1, T)

    def features(x: Tensor, scale: Tensor) -> Tensor:
        y = x.float() * scale
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).to(x.dtype)

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()
        return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6))

    def run(x: dict[str, Tensor]) -> Tensor:
        q, k, v = x["q"], x["k"], x["v"]
        swa = window(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        # The residue starts WINDOW + 1 tokens late: the features of keys and values are shifted by that much.
        shift = WINDOW + 1
        fk, late = features(k, x["k_scale"])[:, :-shift], v[:, :-shift]
        pad = (0, 0, 0, 0, shift, 0)
        fk, late = torch.nn.functional.pad(fk, pad), torch.nn.functional.pad(late, pad)
        rla = linear(features(q, x["q_scale"]), fk, late)
        return (rms(swa, x["swa_weight"]) + rms(rla, x["rla_weight"])).to(q.dtype)

    return name, run


def forward_and_backward(run: Callable[[], Tensor], leaves: list[Tensor], d: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(run(), leaves, d)


def prefill(T: int, clock: Clock, rates: dict[str, Any]) -> dict[str, Any]:
    B = max(1, 32768 // T)
    x = inputs(B, T)
    train = {n: t.detach().requires_grad_(not n.startswith("rope")) for n, t in x.items()}
    q, k, v = heads_first(x)
    tq, tk, tv = (t.detach().requires_grad_() for t in (q, k, v))
    d, d_first = normal(B, T, HQ, D, seed=9), normal(B, HQ, T, D, seed=9)
    leaves = [t for t in train.values() if t.requires_grad]
    result: dict[str, Any] = {"B": B, "T": T, "Hq": HQ, "Hkv": HKV, "D": D, "window": WINDOW}
    result |= {"ms": {}, "peak_bytes": {}}

    def measure(name: str, make: Callable[[], tuple[Callable[[], Tensor], Callable[[], Any]]]) -> None:
        if clock.left() < 30:
            return
        try:
            once, both = make()
        except Exception as error:
            print(f"    {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return
        with torch.no_grad():
            forward = milliseconds(once, clock)
        training = milliseconds(both, clock)
        result["ms"][name] = {"forward": forward, "forward_backward": training}
        result["peak_bytes"][name] = peak_bytes(both)
        print(f"  T {T}: {name}: {forward} ms, {training} ms", flush=True)

    def ours(t: dict[str, Tensor]) -> Tensor:
        return operations["rattention"](**t, **ATTRIBUTES)[0]

    def pair(run: Callable[..., Tensor]) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
        return lambda: run(q, k, v), forward_and_backward(lambda: run(tq, tk, tv), [tq, tk, tv], d_first)

    def composition() -> tuple[Callable[[], Tensor], Callable[[], Any]]:
        result["linear_kernel"], run = unfused(T)
        used = [t for n, t in train.items() if not n.startswith("rope")]
        return lambda: run(x), forward_and_backward(lambda: run(train), used, d)

    measure("rattention", lambda: (lambda: ours(x), forward_and_backward(lambda: ours(train), leaves, d)))
    measure("flex 4096", lambda: pair(flex(4096, T)))
    measure("flex 512", lambda: pair(flex(512, T)))
    measure("sdpa causal", lambda: pair(full_causal))
    measure("unfused", composition)
    own = result["ms"].get("rattention", {})
    result["speedup"] = {
        name: {k: t[k] / own[k] for k in ("forward", "forward_backward") if t.get(k) and own.get(k)}
        for name, t in result["ms"].items()
        if name != "rattention"
    }
    result["share_of_roofline"] = share(result, rates)
    return result


def share(result: dict[str, Any], rates: dict[str, Any]) -> dict[str, float]:
    """Least time of the forward (operations or bytes, whichever bound is later) over the measured one."""
    B, T, ms = result["B"], result["T"], result["ms"].get("rattention", {}).get("forward")
    if not ms or not rates.get("matmul_ops_per_s") or not rates.get("copy_bytes_per_s"):
        return {}
    F = 2 * D
    per_query = 4 * D * min(WINDOW + 1, T) + 2 * F * D
    operations_done = B * T * (HQ * per_query + HKV * 2 * F * D)
    moved = 2 * B * T * D * (2 * HQ + 2 * HKV)
    floor = {"compute": operations_done / rates["matmul_ops_per_s"], "memory": moved / rates["copy_bytes_per_s"]}
    return {name: 1e3 * seconds / ms for name, seconds in floor.items()}


# ---------------------------------------------------------------------------------------------------- 4. decode


def decode(batch: int, clock: Clock, rates: dict[str, Any]) -> dict[str, Any]:
    ring = Ring(
        normal(batch, WINDOW + 1, HKV, D), normal(batch, WINDOW + 1, HKV, D, seed=1),
        normal(batch, HKV, 2 * D, D, dtype=torch.float32), torch.full((batch,), 3000, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    x = inputs(1, 16384)
    q, k, v = normal(batch, 1, HQ, D), normal(batch, 1, HKV, D), normal(batch, 1, HKV, D)
    extra: dict[str, Any] = {n: x[n] for n in ("rope_cos", "rope_sin", "q_scale", "k_scale")}

    def run() -> None:
        step(ring, q, k, v, x["swa_weight"], x["rla_weight"], window=WINDOW, **extra)

    run()
    ring.length.fill_(3000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    ms = milliseconds(graph.replay, clock)
    moved = batch * HKV * (WINDOW * 2 * D * 2 + 2 * 2 * D * D * 4)
    rate = rates.get("copy_bytes_per_s")
    share_of_copy = moved / (ms / 1e3) / rate if ms and rate else None
    entry = {"batch": batch, "ms": ms, "bytes": moved, "share_of_copy": share_of_copy}
    print(f"  decode {entry}", flush=True)
    return entry


# ---------------------------------------------------------------------------------------------------- report


def plot(report: dict[str, Any], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    for axis, key in zip(axes, ("forward", "forward_backward"), strict=False):
        names = dict.fromkeys(n for r in report["prefill"] for n in r["ms"])
        for name in names:
            points = [(r["T"], 1e6 * r["ms"][name][key] / (r["B"] * r["T"])) for r in report["prefill"]
                      if r["ms"].get(name, {}).get(key)]  # fmt: skip
            axis.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
        axis.set(xscale="log", yscale="log", xlabel="T", ylabel="ns per token", title=key.replace("_", " + "))
        axis.legend()
    points = [(r["batch"], 100 * r["share_of_copy"]) for r in report["decode"] if r["share_of_copy"]]
    if points:
        axes[2].plot(*zip(*points, strict=True), marker="o")
    axes[2].axhline(75, linestyle="--", color="grey")
    axes[2].set(xscale="log", xlabel="batch", ylabel="% of copy bandwidth", title="decode", ylim=(0, 105))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Agreement, determinism and speed of the Triton kernels on this GPU.")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--quick", action="store_true", help="few shapes and reruns")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA or ROCm device here: nothing was measured")
        return 2
    clock = Clock(options.minutes)
    kind = device_kind(DEVICE)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "kind": kind, "torch": torch.__version__, "triton": triton.__version__,
        "config": str(config_for(kind, D, D, torch.bfloat16)), "roofline": roofline(clock), "prefill": [], "decode": [],
    }  # fmt: skip
    print(report["device"], report["roofline"], flush=True)

    def write() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    report["agreement"] = agreement(clock, options.quick)
    write()
    for T in (8192,) if options.quick else (8192, 2048, 32768, 65536):
        if clock.left() > 45:
            report["prefill"].append(prefill(T, clock, report["roofline"]))
            write()
    for batch in (64,) if options.quick else (64, 1, 4, 16, 128, 256):
        if clock.left() > 10:
            report["decode"].append(decode(batch, clock, report["roofline"]))
    report["prefill"].sort(key=lambda r: r["T"])
    report["decode"].sort(key=lambda r: r["batch"])
    report["seconds_left"] = clock.left()
    write()
    plot(report, options.out.with_suffix(".png"))
    bad = [r for r in report["agreement"] if not r["agrees"] or not r.get("reruns_equal")]
    print(f"written to {options.out}; {len(bad)} of {len(report['agreement'])} configurations disagree or are unstable")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
