"""Build hook: a wheel carries operations.toml and the stored vectors inside rattention.spec.

An editable install reads both from spec/.
"""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SpecData(BuildHookInterface):
    def initialize(self, version, build_data):
        if version != "standard":
            return
        files = [Path("spec/operations.toml")]
        for kind in ("*.safetensors", "manifest.json", "README.md", "text.txt"):
            files += sorted(p.relative_to(self.root) for p in Path(self.root, "spec/vectors").glob(kind))
        for file in files:
            build_data["force_include"][file.as_posix()] = f"rattention/{file.as_posix()}"
