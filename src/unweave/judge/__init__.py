"""Chat models that are asked for judgements: a server, a local model, or a script; replies are kept and budgeted."""
