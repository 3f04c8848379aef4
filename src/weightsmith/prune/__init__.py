"""Prune: set weights to zero, or remove structures."""

from weightsmith.core.method import family

family(__name__)
