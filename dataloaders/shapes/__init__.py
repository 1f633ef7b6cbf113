"""The built-in data set Shapes: ``scene`` renders scenes, ``dataset`` is the data set."""
