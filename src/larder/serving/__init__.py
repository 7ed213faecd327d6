"""The feature server: Feast's own application, with reads from plans, pushes that are judged, and health checks."""

from larder import feast_version

# Before anything imports what another Feast may not have.
feast_version.checked()
