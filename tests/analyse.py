"""``python -m tests.analyse``: the compiler's static analyser over everything that is C, every warning an error."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vmbus.devices.registry import Registry
from vmbus.machine.engine import build as engine_build
from vmbus.machine.gateway import build as gateway_build

FLAGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror", "-O2", "-fPIC", "-fanalyzer", "-c", "-o", os.devnull)


def main() -> int:
    """1 if anything was found."""
    compiler = os.environ.get("CC", "gcc")
    files = found = 0
    for library in (gateway_build.LIBRARY, engine_build.LIBRARY, *Registry().native_libraries()):
        standard = [flag for flag in library.flags if flag.startswith(("-std", "-D"))]
        with tempfile.TemporaryDirectory() as scratch:
            for source in library.write_sources(Path(scratch)):
                line = [compiler, *standard, *FLAGS, str(source)]
                found += subprocess.run(line, check=False).returncode != 0
                files += 1
    if not found:
        print(f"{compiler} -fanalyzer: nothing found in {files} files")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
