"""Shapes, the built-in data: how scenes are rendered (``scene``) and the data set of them (``dataset``)."""
