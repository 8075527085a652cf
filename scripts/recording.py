"""What the scripts that measure have in common: their environment, and their place in docs/benchmarks.md."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/benchmarks.md"


def enter_environment() -> None:
    """Go on in the project's own environment, set up where it is not there yet, offline."""
    if Path(sys.prefix) != ROOT / ".venv":
        venv = subprocess.run([ROOT / "scripts/setup"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        os.execv(f"{venv}/bin/python", [f"{venv}/bin/python", *sys.argv])
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.path.insert(0, str(ROOT))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def record(name: str, title: str, text: str) -> None:
    """Write ``text`` between the markers of ``name`` on the page; a new section where there are none yet."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Benchmarks\n"
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in page:
        page = f"{page.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n"
    head, rest = page.split(begin)
    PAGE.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
    print(f"recorded in {PAGE.relative_to(ROOT)}")
