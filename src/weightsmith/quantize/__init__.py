"""Quantise: weights in few bits."""

from weightsmith.core.method import family

family(__name__)
