"""Cache-to-cache on vLLM: a KV connector for its engine, and an engine for ``c2c serve``.

Nothing here imports vLLM before it is asked for; ``connector`` alone does at its top, and vLLM itself loads that one.
"""
