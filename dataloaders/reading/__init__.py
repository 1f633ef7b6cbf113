"""What the data sets share: pairs of files and splits, masks in colors, .mat files."""
