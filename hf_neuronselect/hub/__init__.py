"""Cards, and pushing folders to the Hub."""
