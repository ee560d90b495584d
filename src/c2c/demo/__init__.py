"""``c2c demo``: one prompt, answered by four systems, side by side in a browser.

Needs the extra ``demo``. Nothing here imports torch before the page is up: models are loaded in the background.
"""
