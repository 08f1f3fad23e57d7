"""Token files become weights."""
