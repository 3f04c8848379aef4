"""Adapt: small trainable changes on top of frozen weights."""

from weightsmith.core.method import family

family(__name__)
