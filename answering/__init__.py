"""Answers of a model: what was asked for, the prompts, a conversation, the file of answers."""
