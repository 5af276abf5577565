"""What several tests use: tiny models, small jobs, files of other tools, servers, oracles. No test imports another."""
