"""Clustered head attention for efficient inference of large language models, as a library.

>>> from chai.methods import Chai
>>> with Chai(clusters=[8, 6, 4, 4])(model):
...     model.generate(**batch, max_new_tokens=64)

It imports nothing from ``experiments`` or ``analysis``, and does not depend on configurations, tasks or results.
"""
