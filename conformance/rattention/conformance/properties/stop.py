"""How a port behind the wire ends: at `stop`, by itself, with exit status 0."""

from __future__ import annotations

from collections.abc import Iterator

from rattention.conformance import backends
from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.judge import Violation
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe
from rattention.conformance.strategies.plan import supported
from rattention.conformance.strategies.pools import recipes

CALLS = 3
"""What goes wrong at the end, such as memory freed twice, may need calls before it."""


def _draw(plan: Plan) -> Iterator[Recipe]:
    runs = supported(plan)
    if runs:
        yield from recipes(plan, runs[plan.seed % len(runs)], "small", 1, "stop", lambda r: True)


@register("stop", "a port ends at `stop` and can be started again", ("WIRE-4",), _draw, shrinks=False)
def check_stop(ctx: Context, case: Case) -> list[Violation]:
    """A few calls, `stop`, and the call again, for which the port starts anew.

    A backend in this process has nothing to stop; a run of one leaves the case out (`Session.run`).
    """
    if not backends.is_wire_port(ctx.backend):
        return []
    for _ in range(CALLS):
        ctx.run(case.op, case.tensors, case.attrs)
    if fault := backends.stop(ctx.backend):
        ctx.violations.append(Violation(("WIRE-4",), fault, "stop"))  # kept, whatever comes of the next call
    ctx.run(case.op, case.tensors, case.attrs)
    return []
