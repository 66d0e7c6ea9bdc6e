"""Methods that decide the numbers of a plan."""
