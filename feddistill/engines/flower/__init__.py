"""Flower: its simulation, and SuperNodes of institutions. Needs ``pip install 'feddistill[flower]'``."""
