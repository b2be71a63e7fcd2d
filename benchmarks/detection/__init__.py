"""What the guard catches, how early, and how often it is wrong."""
