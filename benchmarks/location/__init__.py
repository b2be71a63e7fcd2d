"""The studies behind docs/located-units.md: one command each, resumed when ended."""
