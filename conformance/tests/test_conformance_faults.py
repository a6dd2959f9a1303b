"""The suite against ports with one fault each: every one is caught at quick, and the right clause is named."""

import faulty_ports as ports
import pytest
from rattention.conformance.oracle import Oracle
from rattention.conformance.runner import Settings, conform

ORACLE = Oracle()
SEED = 20261123


def named(change, select: str, profile: str = "quick", **about) -> list[tuple[str, ...]]:
    """Clauses of the violations of the first failing case, the minimal one."""
    settings = Settings(profile, SEED, select=select, stop_at_first=True)
    outcome = conform(change.__name__, settings, backend=ports.Port(change, **about), oracle=ORACLE)
    assert not outcome.conforming
    assert outcome.failures, "the failure did not come back when it was run again"
    return [v.clauses for v in outcome.violations()]


GROSS = [
    (ports.always_zero, "feature_map", "NUM-1", {}),
    (ports.always_nan, "rms_mix", "MIX-1", {}),
    (ports.capability_liar, "sliding_window_attention", "BCK-3", {}),
    (ports.kernel_liar, "sliding_window_attention", "BCK-4", {"kernels": ["fused"]}),
    (ports.input_changer, "rattention_extend", "ERR-13", {}),
    (ports.aliaser, "residual_linear_attention", "ERR-13", {}),
]


@pytest.mark.parametrize(("change", "select", "clause", "about"), GROSS, ids=[g[0].__name__ for g in GROSS])
def test_a_gross_fault_is_caught_and_named(change, select, clause, about):
    assert any(clause in labels for labels in named(change, select, **about))


SUBTLE = [
    (ports.window_at_bf16, "sliding_window_attention", "SWA-1"),
    (ports.tiled_heads, "sliding_window_attention", "SWA-4"),
    (ports.tf32, "rattention", "NUM-2"),
    (ports.leaking_segments, "residual_linear_attention", "SEG-2"),
    (ports.bf16_state, "rattention_extend", "NUM-3"),
    (ports.small_eps, "rms_mix", "MIX-2"),
    (ports.gradient_ignores_window, "sliding_window_attention.vjp", "GRAD-2"),
    (ports.decode_only, "rattention_extend", "MIX-1"),
    (ports.past_256, "residual_linear_attention", "RLA-1"),
    (ports.float16_gradient, "rattention.vjp", "RLA-3"),
]


@pytest.mark.parametrize(("change", "select", "clause"), SUBTLE, ids=[s[0].__name__ for s in SUBTLE])
def test_a_subtle_fault_is_caught_and_named(change, select, clause):
    labels = named(change, select)
    assert any(clause in found for found in labels), labels


def test_the_honest_reference_conforms():
    outcome = conform("numpy", Settings("smoke", SEED), backend=ports.honest_by_name, oracle=ORACLE)
    assert outcome.conforming, [v.message for v in outcome.violations()]


def test_every_clause_but_the_wire_is_exercised_at_quick():
    """By the plan alone: some case of some property cites each clause."""
    from rattention.conformance.properties import REGISTRY
    from rattention.spec import load

    cited = {label for prop in REGISTRY.values() for label in prop.clauses}
    assert {label for label in load().judged if not label.startswith("WIRE")} <= cited
