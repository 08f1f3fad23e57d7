"""Weights are judged by text."""
