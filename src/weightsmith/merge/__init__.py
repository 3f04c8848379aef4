"""Merge: several checkpoints into one."""

from weightsmith.core.method import family

family(__name__)
