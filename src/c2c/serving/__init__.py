"""``c2c serve``: an HTTP server with the interface of the OpenAI API. Needs the extra ``serve``.

:func:`~c2c.serving.app.create_app` makes the application of an :class:`~c2c.serving.engine.Engine`;
:class:`~c2c.serving.transformers_engine.TransformersEngine` is the engine that runs models in this process.
"""
