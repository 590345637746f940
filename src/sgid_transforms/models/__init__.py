"""Models that captions, generation and report share: checkpoints, captioner, CLIP, attention."""
