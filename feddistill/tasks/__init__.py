"""The tasks: what a model learns, how it answers the proxy set and how it is evaluated; one file a task."""
