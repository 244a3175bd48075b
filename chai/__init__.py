"""Clustered head attention for efficient inference of large language models, as a library.

>>> from chai.methods import Chai
>>> with Chai(clusters=[8, 6, 4, 4])(model):
...     model.generate(**batch, max_new_tokens=64)

It knows torch and transformers, and nothing of configurations, tasks or results.
"""
