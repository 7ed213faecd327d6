"""The version of Feast that the package knows: plugins and feature server call what Feast keeps to itself."""

from importlib.metadata import version

from larder.errors import ConfigError

KNOWN = "0.67"


def checked() -> str:
    """Return Feast's version; ConfigError where it is none that the package knows."""
    held = version("feast")
    if not held.startswith(f"{KNOWN}."):
        raise ConfigError(f"Feast {held} is installed, and this Larder knows {KNOWN}: pip install 'feast=={KNOWN}.*'.")
    return held
