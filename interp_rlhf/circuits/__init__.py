"""Circuits: edge attribution, interventions, tasks and matching on the live model."""
