"""One small file per training stack; all train the codec of ``tiny.py`` on two losses."""
