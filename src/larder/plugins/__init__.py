"""Plugins for anybody's Feast over TimescaleDB and Redis. They need nothing else of Larder."""

from larder import feast_version

# Before they import what another Feast may not have.
feast_version.checked()
