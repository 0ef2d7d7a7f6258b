"""Signals on disk: shards, resume, worker processes and Ray actors."""
