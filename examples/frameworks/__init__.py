"""One small file per training framework; all train the codec of ``tiny.py`` on two losses."""
