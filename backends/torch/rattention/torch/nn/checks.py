"""What a layer accepts: numbers and names when it is made, tensors and devices when it is called."""

from __future__ import annotations

from typing import Any

import torch
from rattention.spec import SpecError, Unsupported, validate
from rattention.torch.arguments import is_dtensor, is_empty_shell, number, on_host, refuse_exotic
from rattention.torch.cache import as_int
from rattention.torch.dispatch import check_name
from torch import Tensor, nn

LAYER = "RAttention"

TAKE_X = frozenset(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
"""The parameters that meet `x` itself."""

MOST_ROWS = 2**27
"""More rows than a rotary table can sensibly have: at head_dim 128 it would take 64 GiB."""


def size(name: str, value: Any) -> int:
    """`value` as an int >= 1."""
    count = as_int(value)
    if count is None or count < 1:
        raise SpecError(LAYER, name, "an int >= 1", repr(value), "ERR-5")
    return count


def flags(**values: Any) -> None:
    """Each of them True or False: a size in their place would pass for True."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise SpecError(LAYER, name, "True or False", repr(value), "ERR-5")


def attributes(
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    feature_map: str,
    eps: float,
    theta: float | None,
    impl: str | None,
) -> tuple[int | None, str, float, float | None]:
    """Window, feature map, eps and rope_theta as the operations take them.

    Raises:
        SpecError: the first that no call could have, in the words of the specification.
        ValueError: no implementation is called `impl`.
    """
    if heads % kv_heads:
        raise SpecError(LAYER, "num_heads", f"a multiple of num_kv_heads={kv_heads}", str(heads), "ERR-6")
    if theta is not None and head_dim % 2:
        raise SpecError(
            LAYER, "head_dim", "an even size to rotate in pairs, or rope_theta=None", str(head_dim), "ERR-7"
        )
    check_name(impl)
    shell = torch.empty(1, 1, 1, 1, dtype=torch.float32, device="meta")
    given = dict.fromkeys("qkv", shell) | dict.fromkeys(("swa_weight", "rla_weight"), shell[0, 0])
    try:
        taken = validate(
            "rattention", given, {"window": number(window), "feature_map": feature_map, "eps": number(eps)}
        ).attributes
        if theta is not None:
            positions = {"positions": torch.empty(0, dtype=torch.int32, device="meta")}
            theta = validate("rope_table", positions, {"head_dim": head_dim, "theta": number(theta)}).attributes[
                "theta"
            ]
    except SpecError as e:
        name = "rope_theta" if e.argument == "theta" else e.argument
        raise SpecError(LAYER, name, e.expected, e.got, e.clause) from None
    return taken["window"], taken["feature_map"], taken["eps"], theta


def tensor(name: str, value: Any) -> None:
    """Refuse what is no tensor (ERR-14). None passes: it stands for an absent one."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        got = f"{type(value).__module__}.{type(value).__qualname__}"
        raise SpecError(LAYER, name, "a torch.Tensor", got, "ERR-14")
    refuse_exotic(LAYER, name, value)


def hidden_states(x: Any, axes: tuple[str, ...], hidden_size: int) -> None:
    """Refuse an `x` that is no tensor of these axes, the last of which is `hidden_size`."""
    if x is None:
        raise SpecError(LAYER, "x", "a torch.Tensor", "none", "ERR-14")
    tensor("x", x)
    if not x.dtype.is_floating_point:
        raise SpecError(LAYER, "x", "a floating dtype", str(x.dtype).removeprefix("torch."), "ERR-4")
    if x.ndim != len(axes) or x.shape[-1] != hidden_size:
        shape = ", ".join((*axes[:-1], f"{axes[-1]}={hidden_size}"))
        raise SpecError(LAYER, "x", f"shape [{shape}]", str(list(x.shape)), "ERR-3")


def mask(name: str, value: Any, x: Tensor) -> None:
    """Refuse what is no tensor of bools or integers `[B]` beside `x`. None passes."""
    tensor(name, value)
    if value is None:
        return
    if value.dtype.is_floating_point or value.dtype.is_complex:
        raise SpecError(LAYER, name, "bools or integers [B]", str(value.dtype).removeprefix("torch."), "ERR-4")
    if value.shape != x.shape[:1]:
        raise SpecError(LAYER, name, f"shape [B={x.shape[0]}]", str(list(value.shape)), "ERR-3")
    if value.device != x.device:
        raise SpecError(LAYER, name, f"device {x.device}, that of x", str(value.device), "ERR-15")


def parameters_beside(layer: nn.Module, x: Tensor) -> None:
    """Refuse parameters that are not where `x` is (ERR-15), such as those that a partial load left on meta, and an `x`
    of another dtype than projections which take it as it is (ERR-4). If all parameters are in one place, `x` is odd.

    A product of a tensor on the CPU and a weight on meta gives memory that nobody wrote, without an error. Submodules
    of other classes than PyTorch's may have tensors elsewhere for reasons of their own, but not on meta. Those with
    hooks may fetch them when they run: they are looked at behind their hooks. A graph looks for itself while it is
    traced.
    """
    if torch.compiler.is_compiling():
        return
    elsewhere: tuple[str, torch.device] | None = None
    places: set[torch.device] = set()
    fetching: list[str] = []
    for path, module in layer.named_modules():
        if module is not layer and ("forward" in vars(module) or module._forward_pre_hooks):
            fetching.append(f"{path}.")
        if any(f"{path}.".startswith(prefix) for prefix in fetching):
            _look_behind_hooks(path, module, x)
            continue
        plain = module is layer or type(module).forward in (nn.Linear.forward, nn.RMSNorm.forward)
        for name, t in (*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)):
            if is_dtensor(t) and not is_dtensor(x):
                raise Unsupported(
                    f"{LAYER}: {name} is a DTensor and x is not. FSDP2 gathers parameters in forward alone, so tell it "
                    "about prefill and step: torch.distributed.fsdp.register_fsdp_forward_method(layer, 'prefill'). "
                    "Other shardings need local tensors"
                )
            if not plain and t.device.type != "meta":
                continue
            if t.device != x.device:
                elsewhere = elsewhere or (name, t.device)
            elif name in TAKE_X and t.dtype != x.dtype and _casts_nothing(t, x):
                expected, got = (str(t.dtype).removeprefix("torch.") for t in (t, x))
                raise SpecError(LAYER, "x", f"dtype {expected}, that of {name}", got, "ERR-4")
            places.add(t.device)
    if elsewhere and len(places) == 1:
        raise SpecError(LAYER, "x", f"device {places.pop()}, that of all parameters", str(x.device), "ERR-15")
    if elsewhere:
        name, device = elsewhere
        raise SpecError(LAYER, name, f"device {x.device}, that of x", str(device), "ERR-15")


def _casts_nothing(weight: Tensor, x: Tensor) -> bool:
    """Whether a product of `x` and `weight` needs them in one dtype. Quantised weights are classes of their own.
    Autocast leaves float64 as it is."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    casts = autocast and torch.float64 not in (weight.dtype, x.dtype)
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not casts


def _look_behind_hooks(path: str, module: nn.Module, x: Tensor) -> None:
    """Have a module with tensors on meta refuse to run, once, if its hooks have not brought them."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if "forward" in vars(module) or x.is_meta or not any(t.is_meta for t in tensors):
        return

    def look(module: nn.Module, _: Any) -> None:
        handle.remove()
        for name in ("weight", "bias", *module._parameters, *module._buffers):
            t = getattr(module, name, None)
            if isinstance(t, Tensor) and t.is_meta:
                raise SpecError(LAYER, f"{path}.{name}", f"device {x.device}, that of x", str(t.device), "ERR-15")

    handle = module.register_forward_pre_hook(look)


def table_rows(x: Tensor, positions: Tensor | None, segment_ids: Tensor | None, max_position: int | None) -> int:
    """How many rows the rotary table of a call needs.

    Raises:
        SpecError: `positions` are not `[B, T]` int32 (ERR-2 .. ERR-4), or so large that no table could hold them.
        ValueError: `max_position` is no int >= 0, or too large; or `positions` cannot be read at no cost, and there is
            no `max_position`.
    """
    bound = None
    if max_position is not None:
        bound = as_int(number(max_position))
        if bound is None or bound < 0:
            raise ValueError(f"max_position: expected an int >= 0, got {max_position!r}")
        if bound >= MOST_ROWS:
            raise ValueError(f"max_position: expected a position below {MOST_ROWS}, got {bound}")
    B, T = x.shape[:2]
    if positions is None:
        return T
    if positions.dtype != torch.int32:
        dtype = str(positions.dtype).removeprefix("torch.")
        raise SpecError(LAYER, "positions", "dtype int32", dtype, "ERR-4")
    if positions.shape != (B, T):
        clause = "ERR-3" if positions.ndim == 2 else "ERR-2"
        raise SpecError(LAYER, "positions", f"shape [B={B}, T={T}]", str(list(positions.shape)), clause)
    rows = 0 if bound is None else bound + 1
    if on_host(positions) and (segment_ids is None or on_host(segment_ids)):
        live = positions
        if segment_ids is not None and segment_ids.shape == positions.shape:
            live = positions[segment_ids != 0]
        largest = int(live.max()) if live.numel() else -1
        if largest >= MOST_ROWS:
            raise SpecError(LAYER, "positions", f"positions below {MOST_ROWS}, for the table", str(largest), "ERR-9")
        return max(rows, largest + 1)
    if bound is None and not is_empty_shell(positions):
        raise ValueError(
            "max_position: expected the largest of positions, for the rotary table, got None: "
            f"positions on {positions.device} are read neither from a device nor while they are traced"
        )
    return max(rows, 1)
