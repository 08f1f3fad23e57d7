"""Weights become text: stop rules, and all that makes it come sooner."""
