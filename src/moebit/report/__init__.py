"""What a run did, to look at: pages and plots."""
