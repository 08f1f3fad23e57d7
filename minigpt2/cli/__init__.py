"""Flags, messages, exit codes: one module a command."""
