"""The command `neuronselect`."""

STOPPED = 130  # exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT
