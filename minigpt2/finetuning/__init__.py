"""A text and a model become a run: what `train.py` and `minigpt2.finetune` share."""
