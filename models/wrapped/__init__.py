"""Models of transformers with the interface of ours; `models/families/hf.py` is their family."""
