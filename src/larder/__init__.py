"""The programs of a Larder host: load bars, compute features, materialize, serve, report."""
