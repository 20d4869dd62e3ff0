"""Gradients of a micro-batch and their derivatives: VJPs, JVPs and curvature policies."""
