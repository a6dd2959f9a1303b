"""Second derivatives of the Pallas kernels are refused in words, by every transformation that asks for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from rattention.jax import (
    Cache,
    Unsupported,
    rattention,
    rattention_extend,
    residual_linear_attention,
    sliding_window_attention,
)
from rattention.jax.pallas import aot, config, once

T, H, D, W = 6, 2, 8, 3
rng = np.random.default_rng(2)
X = jnp.asarray(rng.standard_normal((1, T, H, D)), jnp.float32)
GAIN = jnp.ones((H, D))
WORDS = r"rattention_\w+: the Pallas kernels have first derivatives alone, .*; impl='xla' has second ones"


def forward(x: Any, impl: str = "pallas") -> jax.Array:
    return rattention(x, X, X, GAIN, GAIN, window=W, impl=impl)


def extend(x: Any, tokens: int = T) -> jax.Array:
    cache = Cache.empty(1, H, D, window=W)
    y = X[:, :tokens]
    return rattention_extend(x[:, :tokens], y, y, GAIN, GAIN, cache, window=W, impl="pallas")[0]


def split(x: Any) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    return jax.shard_map(forward, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))(x)


def of(call: Callable[[Any], jax.Array]) -> Callable[[Any], jax.Array]:
    """A loss of one number, so that every transformation fits."""
    return lambda s: jnp.sum(jnp.sin(call(X * s)))


CALLS: dict[str, Callable[[Any], jax.Array]] = {
    "forward": forward,
    "prefill": extend,
    "decode": lambda x: extend(x, 1),
    "vmap": lambda x: jax.vmap(lambda y: forward(y[None])[0])(x),
    "shard_map": split,
    "jit": jax.jit(forward),
}
SECOND: dict[str, Callable[..., Any]] = {
    "grad of grad": lambda f: jax.grad(jax.grad(f)),
    "hessian": jax.hessian,
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(f)),
    "jacfwd of grad": lambda f: jax.jacfwd(jax.grad(f)),
    "jvp of grad": lambda f: lambda s: jax.jvp(jax.grad(f), (s,), (s,)),
    "grad of value_and_grad": lambda f: jax.grad(lambda s: jax.value_and_grad(f)(s)[1]),
    "linearize of grad": lambda f: lambda s: jax.linearize(jax.grad(f), s)[0],
    "in a scan": lambda f: jax.grad(lambda s: jax.lax.scan(lambda c, _: (c + jax.grad(f)(s), None), s, length=2)[0]),
}


@pytest.mark.parametrize("second", SECOND)
def test_every_transformation_says_so(second: str) -> None:
    for run in (SECOND[second](of(forward)), jax.jit(SECOND[second](of(forward)))):
        with pytest.raises(Unsupported, match=WORDS):
            jax.eval_shape(run, 1.0)
    with pytest.raises(Unsupported, match=WORDS):
        SECOND[second](of(forward))(1.0)


@pytest.mark.parametrize("name", CALLS)
def test_every_call_says_so(name: str) -> None:
    for second in ("grad of grad", "hessian", "jvp of grad"):
        with pytest.raises(Unsupported, match=WORDS):
            jax.eval_shape(SECOND[second](of(CALLS[name])), 1.0)


def test_the_branches_say_so() -> None:
    for branch in (sliding_window_attention, residual_linear_attention):
        with pytest.raises(Unsupported, match="first derivatives alone"):
            jax.eval_shape(jax.hessian(of(lambda x, f=branch: f(x, X, X, window=W, impl="pallas"))), 1.0)


def test_forward_mode_is_refused_by_name() -> None:
    """JAX itself does, as for long calls of the XLA form."""
    for call in (forward, extend):
        with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\) to a custom_vjp function"):
            jax.jvp(of(call), (1.0,), (1.0,))


def test_first_derivatives_beside_another_differentiation() -> None:
    """A gradient that the outer derivative does not reach is one derivative, not two."""

    def outer(s: Any) -> Any:
        inner = jax.grad(of(forward))(jax.lax.stop_gradient(s))
        return s * s * inner

    # By the other implementation, whose float32 sums have another order.
    expected = 4 * jax.grad(of(lambda x: forward(x, "xla")))(2.0)
    np.testing.assert_allclose(jax.jit(jax.grad(outer))(2.0), expected, rtol=1e-4)


def test_what_is_compiled_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowered gradient, with and without the identity."""

    def lowered() -> str:
        f, args = aot.program("backward", 128, "bfloat16", config.default("v5p", 128), 511, T=1024)
        return jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).as_text()

    found = lowered()
    monkeypatch.setattr("rattention.jax.pallas.calls.once", lambda kernel, operands: operands)
    assert found == lowered()
    assert "custom_jvp" not in found
    assert once.once("any", X) is not None
