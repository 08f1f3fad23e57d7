"""Test sets that others use are scored, and stand beside what they published."""
