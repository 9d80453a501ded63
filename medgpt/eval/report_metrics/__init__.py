"""Metrics of generated radiology reports, in numpy from an annotation cache or from text alone."""
