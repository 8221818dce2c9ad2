"""Learned image compression: a codec, its training with balanced losses, and its evaluation."""
