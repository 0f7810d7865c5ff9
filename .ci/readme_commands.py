"""Print command number N of the README: the N-th block fenced as ```bash, without its fences.

The README is the one place where the two commands are written; this is how `.ci/run` and the tests read them.
"""

import re
import sys
from pathlib import Path

FENCE = re.compile(r"^```bash[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def readme_commands(readme: Path) -> list[str]:
    """The bash blocks of `readme`, in order. Raises if there are fewer than the two that the project promises."""
    commands = [block.strip() for block in FENCE.findall(readme.read_text(encoding="utf-8"))]
    if len(commands) < 2:
        raise SystemExit(f"{readme.name}: expected two ```bash blocks (train, then test), found {len(commands)}")
    return commands


if __name__ == "__main__":
    sys.stdout.write(readme_commands(Path(sys.argv[1]))[int(sys.argv[2]) - 1] + "\n")
