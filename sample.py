"""Continue a prompt with GPT-2 or a model you trained: python sample.py --prompt "One day" """

from minigpt2.system.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # from the first import on

    import sys

    from minigpt2.cli.sample import run

    sys.exit(run())
