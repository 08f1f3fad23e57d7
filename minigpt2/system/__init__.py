"""This machine: files, signals, memory, number formats, processes."""
