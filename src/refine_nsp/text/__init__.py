"""Text: reading it from files, folders and the hub."""
