"""Options, errors, sources and records: what every other folder builds on."""
