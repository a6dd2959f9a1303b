"""Build hook: a wheel carries operations.toml inside rattention.spec; an editable install reads it from spec/."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class OperationsFile(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "standard":
            build_data["force_include"]["spec/operations.toml"] = "rattention/spec/operations.toml"
