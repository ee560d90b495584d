"""``c2c demo``: one prompt, four ways to answer it, side by side in a browser.

Needs the extra ``demo``. Nothing here imports torch before the page is up: models are loaded in the
background.
"""
