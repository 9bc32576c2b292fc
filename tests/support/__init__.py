"""What several tests need: tiny models, texts, independent references."""
