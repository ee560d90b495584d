"""Pictures of what crosses: of a fuser alone, or of one prompt read by a pair.

The measures are those of :mod:`c2c.analysis`, which takes them over many questions; here they are of one prompt.
"""
