"""SAEBench's measures, with what each number can carry."""
