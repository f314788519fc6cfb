"""Explain one text or image with one method, in the terminal and as a picture."""

from xviz_jax.explain.request import Request as Request
from xviz_jax.explain.request import methods as methods
from xviz_jax.explain.request import run as run
