"""What will be done, known before it starts."""
