"""Ways to compute the model: this project's runtimes, and their rivals."""
