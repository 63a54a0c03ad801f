"""Restricted Boltzmann machines: model, samplers, negative phases and estimates of log Z."""
