"""cdist: distil a vision-language teacher into a small student without the teacher in memory."""

__version__ = "0.1.0"
