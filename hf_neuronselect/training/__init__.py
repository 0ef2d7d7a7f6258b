"""What follows a selection: measuring what it is worth."""
