"""The folder of a run, and what is told of it."""
