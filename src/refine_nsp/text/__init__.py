"""This room reads documents from files, folders and the hub."""
