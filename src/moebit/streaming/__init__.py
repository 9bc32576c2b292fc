"""Hidden states on their way through the decoder layers, and what is observed of them."""
