"""Fine-tune GPT-2, or train a small one, on your own text: python train.py --data my.txt"""

from minigpt2.system.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # from the first import on

    from minigpt2.cli.console import leave
    from minigpt2.cli.train import run

    leave(run())
