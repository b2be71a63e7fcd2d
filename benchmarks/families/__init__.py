"""Which families of models are guarded: each built tiny from its configuration, and put to the test."""
