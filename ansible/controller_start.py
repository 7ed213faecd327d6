"""The start of every program of .venv, whoever calls it: `./larder env` installs this file, and Python imports it.

Molecule calls `ansible-playbook` and `pytest` by name: .venv/bin/molecule would not find them without .venv/bin on
PATH. Ansible does not start where the locale has no UTF-8 (LC_ALL=C) or is not installed (a LANG that came by SSH).
"""

from __future__ import annotations

import locale
import os
import sys
from pathlib import Path

UTF_8 = "C.UTF-8"  # every Debian has it


def has_utf_8() -> bool:
    """Return whether the caller's locale can be used and is one of UTF-8."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "")
        return locale.getlocale()[1] == "UTF-8"
    except (locale.Error, ValueError):
        return False
    finally:
        locale.setlocale(locale.LC_ALL, before)


def prepare() -> None:
    """Put this environment's programs on PATH, and replace a locale with which Ansible would not start."""
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if programs not in path:
        os.environ["PATH"] = os.pathsep.join([programs, *path])
    if not has_utf_8():
        os.environ["LC_ALL"] = UTF_8
    # Beside a galaxy.yml, Molecule otherwise warns that scenarios belong in extensions/.
    os.environ.setdefault("MOLECULE_GLOB", "molecule/*/molecule.yml")


prepare()
