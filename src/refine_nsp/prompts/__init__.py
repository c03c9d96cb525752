"""Prompts with answers, for training and for evaluation: examples, question sources, RULER's generators, encoding."""
