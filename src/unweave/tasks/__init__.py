"""The data of the papers' tasks, made from our own word lists for any tokenizer."""
