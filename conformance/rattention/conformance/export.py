"""Generated cases with the reference's answers, as a set on disk."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rattention.conformance import vectors
from rattention.conformance.backends import CannotRun
from rattention.conformance.case import Case
from rattention.conformance.oracle import Oracle
from rattention.conformance.properties import REGISTRY, make_case
from rattention.conformance.reporting.folder import CannotWrite, Folder, try_folder
from rattention.conformance.strategies import make_plan
from rattention.spec import load


def export(folder: Path, profile: str, seed: int) -> int:
    """Write the agreement cases of a profile, and where onnx is installed their graphs.

    Files of an earlier export that are still in the folder are removed.

    Returns:
        how many cases were written.

    Raises:
        CannotRun: the folder cannot be written, or holds a set that is no export.
    """
    target = Folder(folder)
    try_folder(folder, (vectors.MANIFEST,), what="vectors export")
    if target.foreign(vectors.MANIFEST):
        raise CannotRun(f"vectors export {folder}: a {vectors.MANIFEST} is there that no export has written")
    plan, oracle = make_plan(profile, seed, {"name": "export"}), Oracle()
    prop = REGISTRY["agreement"]
    cases: dict[str, Case] = {}
    for i, recipe in enumerate(prop.draw(plan)):
        case = make_case(prop, plan, recipe)
        if case is None:
            continue
        case.answer(oracle.evaluate(case.op, case.tensors, case.attrs))
        cases[f"{case.op.replace('.', '-')}-{i:04d}"] = case
    about = {"about": "generated cases with the reference's answers", "spec_version": load().version, "seed": seed}
    files = vectors.set_files(cases, {**about, "profile": profile})
    if importlib.util.find_spec("onnx"):
        from rattention.conformance.oracles.export import graphs

        files = {f"onnx/{name}": data for name, data in graphs(cases.values()).items()} | files
    try:
        target.write(files)
    except CannotWrite as error:
        raise CannotRun(str(error)) from None
    return len(cases)
