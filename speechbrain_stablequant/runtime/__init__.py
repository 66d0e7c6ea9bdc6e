"""Ways to execute a plan."""
