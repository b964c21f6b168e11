from .text_format import other_format as other_format  # for pickle.py
