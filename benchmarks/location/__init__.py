"""The studies behind docs/results/location.md: one command each, resumed when ended."""
