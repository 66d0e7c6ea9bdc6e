"""What all methods share, independent of any toolkit."""
