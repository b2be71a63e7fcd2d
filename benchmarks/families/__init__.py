"""Which families of models are guarded: each is built tiny and put to the test."""
