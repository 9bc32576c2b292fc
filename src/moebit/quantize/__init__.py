"""The main job: a checkpoint becomes a quantized checkpoint, one decoder layer at a time."""
