"""Initialise: tensors from shapes, before any training."""

from weightsmith.core.method import family

family(__name__)
