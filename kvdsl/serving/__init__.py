"""Serving: what an engine that hands out blocks of pages to requests needs of a scheme; engines are bound elsewhere."""

from .layer import ServedLayer
from .served import Served, served, unserved
from .slots import Slots
from .step import Group, Requests, Step

__all__ = ["Group", "Requests", "Served", "ServedLayer", "Slots", "Step", "served", "unserved"]
