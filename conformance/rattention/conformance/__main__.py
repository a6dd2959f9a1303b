"""Entry point of the command `rattention`; it says in one line what to install where a package is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from rattention.conformance import interrupts

NEEDS = ("hypothesis", "jinja2", "jsonschema", "rich", "safetensors", "typer")
"""The packages of the extra `conformance`."""


def main() -> None:
    interrupts.listen()
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        print(f"rattention: {names} not installed: install rattention with its extra conformance", file=sys.stderr)
        sys.exit(2)
    from rattention.conformance import cli

    cli.main()


if __name__ == "__main__":
    main()
