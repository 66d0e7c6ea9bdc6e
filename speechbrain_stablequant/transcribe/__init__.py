"""A recognizer from a folder, without executing anything in it."""
