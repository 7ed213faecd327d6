"""Where a service finds its connection details: one directory, by default the one that systemd decrypts for it."""

import os
from pathlib import Path
from typing import Any

from larder.errors import ConfigError


class Credentials:
    """A directory with feature_store.yaml, and for the pipeline load_url and pipeline_url."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    @property
    def directory(self) -> Path:
        directory = self._directory or os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            raise ConfigError(
                "No credentials: give --credentials DIR, or run as a unit that has CREDENTIALS_DIRECTORY."
            )
        if not Path(directory).is_dir():
            raise ConfigError(f"No credentials: {directory} is not a directory.")
        return Path(directory)

    def _file(self, name: str) -> Path:
        path = self.directory / name
        if not path.is_file():
            raise ConfigError(f"No credential {name} in {self.directory}.")
        return path

    def _read(self, name: str) -> str:
        try:
            return self._file(name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"Credential {name} in {self.directory} cannot be read: {type(error).__name__}."
            ) from None

    @property
    def given(self) -> bool:
        """Whether there are any: some commands do with less where there are none."""
        return bool(self._directory or os.environ.get("CREDENTIALS_DIRECTORY"))

    @property
    def load_url(self) -> str:
        """PostgreSQL as the role that writes bars."""
        return self._read("load_url")

    @property
    def pipeline_url(self) -> str:
        """PostgreSQL as the role that reads bars and writes features."""
        return self._read("pipeline_url")

    @property
    def openlineage_token(self) -> str:
        """The token for the receiver of OpenLineage events; empty where it asks for none."""
        return self._read("openlineage_token") if (self.directory / "openlineage_token").exists() else ""

    @property
    def feature_store(self) -> Path:
        return self._file("feature_store.yaml")

    def feature_store_config(self) -> dict[str, Any]:
        """feature_store.yaml as Feast reads it, without importing Feast."""
        import yaml

        try:
            config = yaml.safe_load(os.path.expandvars(self._read("feature_store.yaml")))
        except yaml.YAMLError:  # its text may hold a secret
            raise ConfigError(f"{self.feature_store} is not valid YAML.") from None
        if not isinstance(config, dict) or "project" not in config:
            raise ConfigError(f"{self.feature_store} names no project.")
        return config

    @property
    def registry_url(self) -> str:
        """The SQL registry's database, as psycopg takes it."""
        registry = self.feature_store_config().get("registry")
        path = registry.get("path") if isinstance(registry, dict) else None
        if not isinstance(path, str) or not path.startswith(("postgresql+psycopg://", "postgresql://")):
            raise ConfigError(f"The registry in {self.feature_store} is not an SQL registry in PostgreSQL.")
        return path.replace("postgresql+psycopg://", "postgresql://", 1)
