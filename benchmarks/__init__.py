"""Programs that measure: `python -m benchmarks`, `python -m benchmarks.ablation`, `python -m benchmarks.counted`.

`-m` puts the repository's root first on the path, where ./selfreg_fast has no kernels if the package was not installed
in place: the installed one must come before it.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parents[1]:
    sys.path.append(sys.path.pop(0))
