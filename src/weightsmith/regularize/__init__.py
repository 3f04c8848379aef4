"""Regularise: differentiable measures to add to a loss."""

from weightsmith.core.method import family

family(__name__)
