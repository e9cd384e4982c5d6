"""From a file of records to batches of token ids: tokenizer, chat templates, formats, masks."""
