"""Tasks with two answers of which one is right, and with a cue that agrees in training and misleads afterwards."""
