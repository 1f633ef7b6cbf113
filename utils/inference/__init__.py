"""Files in, files out: the images that ``inference.py`` reads and the files that it writes."""
