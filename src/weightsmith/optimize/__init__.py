"""Optimise: optimizers as torch has them."""

from weightsmith.core.method import family

family(__name__)
