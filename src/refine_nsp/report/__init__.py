"""This room makes tables, plots, model cards, and one self-contained HTML page for each run."""
