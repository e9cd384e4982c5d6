"""The model and data of `python train.py` without arguments: a Llama of under a million
parameters that knows a small valley, and the questions that teach it to answer."""
