"""Loss per answer token on held-out rows."""
