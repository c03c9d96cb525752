"""The demonstration: the default text, generated recall documents and probes, the tiny bases, the quickstart."""
