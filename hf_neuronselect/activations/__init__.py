"""From token ids to activations: batches, the prefix of a causal LM, sparse autoencoders."""
