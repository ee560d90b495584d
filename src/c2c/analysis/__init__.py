"""What a fused cache is made of, and what of it matters: the measurements of the Cache-to-Cache paper for any fuser.

``measures``: effective rank, gates, cache map; ``ablations``: progressive, layers, precision; ``enrichment``: the
oracle; ``scaling``: sharers of several sizes; ``capture``: entries before and after fusion; ``config``: settings.
"""
