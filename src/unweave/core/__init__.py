"""What every other part stands on: sites, specs, run directories, sparse codes, errors. No transformers here."""
