"""The client side: local training, answers on the proxy set, and handling of the server's instructions."""
