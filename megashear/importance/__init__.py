"""Importance of the units of a source model: criteria, calibration, principal basis, least-squares fit."""
