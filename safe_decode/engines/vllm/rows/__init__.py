"""What the guard knows of the rows of a worker, whichever of vLLM's model runners drives it."""
