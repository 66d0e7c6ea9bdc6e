"""The float model computing as a plan says."""
