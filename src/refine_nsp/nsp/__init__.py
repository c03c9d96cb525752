"""The method has one file for each step of the paper; `step.py` is its page, and calls them in order."""
