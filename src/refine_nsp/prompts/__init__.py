"""This room makes prompts with answers, for training and for evaluation, and turns them into tokens."""
