"""Files: what is read, lazily, and what is written, durably."""
