"""The commands: what each is told, and what it calls. One file for each group; a handler parses, calls and prints."""
