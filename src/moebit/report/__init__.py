"""What happened, as pages for people: one output's report, and several outputs side by side."""
