"""Measure: numbers about weights, and statistics as Weights."""

from weightsmith.core.method import family

family(__name__)
