"""The command by its older name: python -m minigpt2.corpus PATHS"""

from ..system.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # from the first import on

    import sys

    from ..cli.corpus import run

    sys.exit(run())
