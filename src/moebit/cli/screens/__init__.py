"""What is printed for each kind of result."""
