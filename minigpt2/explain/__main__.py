"""Write a page that explains a model by a text: python -m minigpt2.explain --prompt TEXT"""

from ..system.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # from the first import on

    from ..cli.console import leave
    from ..cli.explain import run

    leave(run())
