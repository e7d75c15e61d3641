"""Print what pyproject.toml asks for and this Python does not have, one requirement a line.

    python3 tools/missing_requirements.py [EXTRA ...]

Reads installed packages' metadata and imports none of them, so it takes a fraction of a second. Needs nothing
but Python 3.11, because it runs before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def missing(project: dict, extras: list[str]) -> Iterator[str]:
    """Requirements of the `[project]` table and its `extras` that are absent or of another version."""
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    try:
        from packaging.requirements import Requirement
    except ImportError:  # it comes with everything else: nothing of ours is installed
        yield from wanted
        return
    for line in wanted:
        requirement = Requirement(line)
        if requirement.name == project["name"]:  # an extra that includes another
            yield from missing({**project, "dependencies": []}, sorted(requirement.extras))
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield line
        else:
            if not requirement.specifier.contains(version, prereleases=True):
                yield f"{line} (there is {version})"


if __name__ == "__main__":
    with PYPROJECT.open("rb") as file:
        found = list(missing(tomllib.load(file)["project"], sys.argv[1:]))
    print("\n".join(found))
