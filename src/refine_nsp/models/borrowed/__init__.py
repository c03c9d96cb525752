"""transformers' own causal models, with states: hybrids of linear attention or Mamba-2, and plain attention."""
