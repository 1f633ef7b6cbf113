"""Types with limits for the numbers in a config, used by its sections and by constructors.

Constructors annotate their arguments with these types, and configs are checked against them. Upper limits are far above
useful values; they only keep typing errors from exhausting the memory.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

LARGEST = 2**31 - 1

Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
ClassId = Annotated[int, Field(ge=0, le=65535)]
Label = Annotated[int, Field(ge=-(2**31), le=LARGEST)]
Byte = Annotated[int, Field(ge=0, le=255)]
ClassCount = Annotated[int, Field(ge=1, le=65536)]
Channels = Annotated[int, Field(ge=1, le=65536)]
Side = Annotated[int, Field(ge=1, le=65536)]
"""The height or the width of an image, in pixels."""

Width = Annotated[int, Field(ge=1, le=8192)]
"""Channels inside a network, or the side of a kernel."""
BatchSize = Annotated[int, Field(ge=1, le=65536)]
WorkerCount = Annotated[int, Field(ge=0, le=1024)]

Number = Annotated[float, Field(ge=-1e30, le=1e30)]
NonNegative = Annotated[float, Field(ge=0.0, le=1e30)]
AboveZero = Annotated[float, Field(gt=0.0, le=1e30)]
Amount = Annotated[float, Field(ge=0.0, le=180.0)]
"""How strong an augmentation is: degrees for rotations."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
ShareBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
ShareAboveZero = Annotated[float, Field(gt=0.0, le=1.0)]
