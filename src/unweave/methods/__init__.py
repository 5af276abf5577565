"""One folder per thing a user can do, from its question to its picture."""
