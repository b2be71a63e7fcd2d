"""The tests; shared models and the byte tokenizer are in `models.py`."""
