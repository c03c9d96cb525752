"""This room gives states to transformers' own causal models: hybrids of linear attention or Mamba-2, and plain attention."""
