"""What the package's build does beside copying: it compiles the library for CRIU, where there is a compiler.

A wheel that has it is one for this machine's kind; a wheel without it is for all, and the library is compiled when it
is first wanted (incdump/criu/preload_library.py). CC names another compiler; `CC=false` makes a wheel for all.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACE = "incdump/criu"


class PreloadLibrary(BuildHookInterface[Any]):
    """Puts preload.so beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the wheel is made."""
        if self.target_name != "wheel" or version == "editable":
            return
        spec = importlib.util.spec_from_file_location("preload_library", Path(self.root, PLACE, "preload_library.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._made = tempfile.TemporaryDirectory(prefix="incdump-build-")
        made = Path(self._made.name, module.BUILT.name)
        try:
            module.compile_library(made, os.environ.get("CC") or None)
        except OSError as error:
            self.app.display_warning(f"without the library for CRIU, it is compiled when it is first wanted: {error}")
            return
        build_data["force_include"][str(made)] = f"{PLACE}/{made.name}"
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """After it."""
        if hasattr(self, "_made"):
            self._made.cleanup()
