"""What is said of guests and of the host."""
