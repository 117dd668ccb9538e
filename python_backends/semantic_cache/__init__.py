"""A cache of answers that finds a prompt again by its bytes, then by its meaning."""
