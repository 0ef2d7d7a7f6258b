"""The command `neuronselect`."""
