"""The demonstration holds the default text, generated documents and recall probes, the tiny bases and their pretraining, the quickstart."""
