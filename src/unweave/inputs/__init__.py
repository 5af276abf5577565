"""What a question names, opened and identified: model, text, SAEs."""
