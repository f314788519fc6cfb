"""Explain one text or image with one method, in the terminal and as a picture."""

from xviz_jax.explain.request import Request as Request
from xviz_jax.explain.request import run as run
from xviz_jax.methods import methods as methods
