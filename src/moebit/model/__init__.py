"""Models as moebit sees them: a lazily read checkpoint, its structure, and hidden states streaming through its layers."""
