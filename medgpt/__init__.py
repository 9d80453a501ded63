"""MedGPT: an open biomedical vision-language model on medgpt_kernels."""

__version__ = "0.1.0"
