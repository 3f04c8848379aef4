"""Align: permutations and maps that bring networks or their features into one order."""

from weightsmith.core.method import family

family(__name__)
