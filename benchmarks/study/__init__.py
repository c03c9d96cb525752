"""This package is the small-scale study behind `benchmarks/paper_tables.py`: its settings, data, jobs and tables."""
