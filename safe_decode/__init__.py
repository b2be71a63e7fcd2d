"""safe-decode: generation-time safety re-evaluation for language models."""
