"""Rewrite a checkpoint as a clean Hugging Face folder: python convert_weights.py SOURCE DEST"""

from minigpt2.system.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # from the first import on

    import sys

    from minigpt2.cli.convert import run

    sys.exit(run())
