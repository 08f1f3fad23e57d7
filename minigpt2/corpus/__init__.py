"""Text becomes token files."""
