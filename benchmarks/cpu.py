"""CPU timings as ratios, taken in one run: what the eager Torch form and the XLA form of JAX cost.

    python benchmarks/cpu.py [--out benchmarks/results/cpu.json]

Torch: `rattention` (window 511) against full causal `scaled_dot_product_attention`, forward and forward + backward, at
T and 4T, and decode time per token at position 1k and 32k with the state's error against float64. JAX: the same
scaling with T, compiled. The candidates of a comparison take turns, so that a disturbance hits all of them alike: a
ratio is taken within each round and its median over the rounds counts, since the speed of a shared machine drifts from
round to round. Scaling is 4T over the mean of T just before and just after it. Times depend on the machine, ratios much
less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provenance import commit

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / p) for p in ("spec", "backends/torch", "backends/jax")]

WINDOW, HQ, HKV, D = 511, 8, 2, 64


Seconds = dict[str, list[float]]


def interleaved(candidates: dict[str, Callable[[], Any]], repetitions: int) -> Seconds:
    """Seconds of each candidate in each round; one warm-up round, then rounds in which all take turns."""
    seconds: Seconds = {name: [] for name in candidates}
    for turn in range(repetitions + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    return {name: statistics.median(s) for name, s in seconds.items()}


def scaling(what: str, run: Callable[[Any], Any], short: Any, long: Any) -> dict[str, Callable[[], Any]]:
    """The three turns of a scaling: T, 4T, T again."""
    turns = ("T", short), ("4T", long), ("T again", short)
    return {f"{what} {name}": lambda given=given: run(given) for name, given in turns}


def over(seconds: Seconds, above: str, *below: str) -> float:
    """Median over the rounds of `above` over the mean of `below`."""
    rounds = zip(seconds[above], *(seconds[name] for name in below), strict=True)
    return statistics.median(a / statistics.mean(b) for a, *b in rounds)


def torch_part(T: int, repetitions: int, tokens: int) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from rattention.torch import rattention

    def inputs(length: int) -> list[torch.Tensor]:
        make = torch.Generator().manual_seed(0)
        shapes = (1, length, HQ, D), (1, length, HKV, D), (1, length, HKV, D)
        qkv = [torch.randn(s, generator=make) for s in shapes]
        return [x.requires_grad_() for x in (*qkv, torch.ones(HQ, D), torch.ones(HQ, D))]

    def ours(t: list[torch.Tensor]) -> torch.Tensor:
        out = rattention(t[0], t[1], t[2], t[3], t[4], window=WINDOW)
        assert isinstance(out, torch.Tensor)
        return out

    def full(t: list[torch.Tensor]) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in t[:3])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def forward(f: Callable[..., torch.Tensor], t: list[torch.Tensor]) -> None:
        with torch.no_grad():
            f(t)

    def both(f: Callable[..., torch.Tensor], t: list[torch.Tensor], wanted: int) -> None:
        out = f(t)
        torch.autograd.grad(out, t[:wanted], cotangents[tuple(out.shape)])

    short, long = inputs(T), inputs(4 * T)
    # The gradient of an output comes from the layers after it: its memory is not part of what is timed.
    cotangents: dict[tuple[int, ...], torch.Tensor] = {
        shape: torch.ones(shape) for length in (T, 4 * T) for shape in ((1, length, HQ, D), (1, HQ, length, D))
    }
    candidates = {
        **scaling("rattention forward", lambda t: forward(ours, t), short, long),
        "sdpa forward T": lambda: forward(full, short),
        **scaling("rattention forward+backward", lambda t: both(ours, t, 5), short, long),
        "sdpa forward+backward T": lambda: both(full, short, 3),
    }
    seconds = interleaved(candidates, repetitions)
    ratios = {}
    for what in ("forward", "forward+backward"):
        own = f"rattention {what}"
        ratios[f"{what}: over sdpa"] = over(seconds, f"{own} T again", f"sdpa {what} T")
        ratios[f"{what}: 4T over T"] = over(seconds, f"{own} 4T", f"{own} T", f"{own} T again")
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": medians(seconds),
        "ratios": ratios,
        "decode": torch_decode(tokens),
    }


def torch_decode(tokens: int) -> dict[str, Any]:
    """One sequence, token by token: the state's error, and the median time of a token after 1k and after all of them.

    The two are timed in turns, from the caches as they stood then.
    """
    import torch
    from rattention.torch import Cache, rattention_extend

    make = torch.Generator().manual_seed(1)
    cache = Cache.empty(1, HKV, D, window=WINDOW)
    weight = torch.ones(HQ, D)
    exact = torch.zeros(HKV, 2 * D, D, dtype=torch.float64)
    early, at = min(1024, tokens // 2), 400
    young = cache
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode():
        for position in range(tokens):
            young = cache if position == early else young
            q, k = (torch.randn(1, 1, h, D, generator=make) for h in (HQ, HKV))
            v = torch.randn(1, 1, HKV, D, generator=make) + 0.5
            _, cache = rattention_extend(q, k, v, weight, weight, cache, window=WINDOW)
            waiting.append((k[0, 0].double(), v[0, 0].double()))
            if len(waiting) > WINDOW:
                key, value = waiting.pop(0)
                exact += torch.cat((key.softmax(-1), (-key).softmax(-1)), -1)[:, :, None] * value[:, None]
        steps = {
            name: lambda c=c: rattention_extend(q, k, v, weight, weight, c, window=WINDOW)
            for name, c in (("early", young), ("late", cache))
        }
        first, last = medians(interleaved(steps, at)).values()
    scale = exact.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return {
        "tokens": tokens,
        "seconds per token early": first,
        "seconds per token late": last,
        "early position": early,
        "late over early": last / first,
        "state relative error": float((cache.state[0].double() - exact).norm() / scale),
    }


def jax_part(T: int, repetitions: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from rattention.jax import rattention

    def inputs(length: int) -> list[Any]:
        keys = jax.random.split(jax.random.key(0), 3)
        qkv = [jax.random.normal(key, (1, length, h, D)) for key, h in zip(keys, (HQ, HKV, HKV), strict=True)]
        return [*qkv, jnp.ones((HQ, D)), jnp.ones((HQ, D))]

    def ours(*t: Any) -> Any:
        return rattention(*t, window=WINDOW)

    forward = jax.jit(ours)
    both = jax.jit(jax.grad(lambda *t: ours(*t).sum(), argnums=(0, 1, 2, 3, 4)))
    short, long = inputs(T), inputs(4 * T)
    candidates = {
        **scaling("forward", lambda t: jax.block_until_ready(forward(*t)), short, long),
        **scaling("forward+backward", lambda t: jax.block_until_ready(both(*t)), short, long),
    }
    seconds = interleaved(candidates, repetitions)
    ratios = {
        f"{w}: 4T over T": over(seconds, f"{w} 4T", f"{w} T", f"{w} T again") for w in ("forward", "forward+backward")
    }
    return {"jax": jax.__version__, "seconds": medians(seconds), "ratios": ratios}


def processor() -> str:
    """The name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="T (default 8192)")
    parser.add_argument("--decode", type=int, default=32768, help="tokens to decode (default 32768)")
    parser.add_argument("--repetitions", type=int, default=15, help="rounds (default 15)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["torch", "jax"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu.json")
    given = parser.parse_args(arguments)

    result: dict[str, Any] = {
        "commit": commit(),
        "device": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "python": platform.python_version(),
        "shape": {"B": 1, "T": given.tokens, "Hq": HQ, "Hkv": HKV, "D": D, "window": WINDOW, "dtype": "float32"},
        "repetitions": given.repetitions,
    }
    if given.only != "jax":
        import torch

        torch.set_num_threads(given.threads)
        result["torch"] = torch_part(given.tokens, given.repetitions, given.decode)
    if given.only != "torch":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        result["jax"] = jax_part(given.tokens, given.repetitions)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name in ("torch", "jax"):
        for what, ratio in result.get(name, {}).get("ratios", {}).items():
            print(f"{name:5} {what:35} {ratio:7.3f}")
    if "torch" in result:
        print(*(f"decode {k}: {x:.3g}" for k, x in result["torch"]["decode"].items()), sep="\n")
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
