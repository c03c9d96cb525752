"""Reports: tables, plots, one self-contained HTML page a run."""
