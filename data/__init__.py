"""From a file of records to batches of token ids.

sources        which files --data means
reading/       a file as records, each with its place
formats/       a record as an example: a conversation, a prompt with its completion, a text
chat/          a conversation as text, written by a chat template, and where the assistant speaks
tokenizer      text as token ids
samples        an example as token ids, and which of them are learned
tokens/        all examples of a data set as samples, in confined processes, kept on disk
dataset        samples and their counts; audit shows and judges them
epochs         their order; packing and batches lay them into rows
prompt         a prompt as a checkpoint expects it
"""
