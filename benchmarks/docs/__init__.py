"""Pages, tables and pictures out of results; no figure is typed."""
