"""Keep a name that pickle.py imports from here."""

from .text_format import other_format as other_format
