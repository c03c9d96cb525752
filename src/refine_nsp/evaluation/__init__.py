"""This room evaluates models: tasks, metrics, statistics, and the model that lm-eval runs."""
