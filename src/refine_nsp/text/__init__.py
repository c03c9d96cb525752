"""Text: reading it from files, the default corpus, and generated recall documents."""
