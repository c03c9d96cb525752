"""Memory and time of a training step, counted before anything large is loaded."""
