"""What crosses rooms in the proof of an installation, item by item."""
