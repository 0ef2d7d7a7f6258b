"""Loading causal LMs and SAEs, running their blocks, and taking losses."""
