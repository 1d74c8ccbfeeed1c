"""The server side: rounds, the exchange with clients, requests, checks of what clients report."""
