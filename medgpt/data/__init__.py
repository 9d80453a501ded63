"""Rows of images and conversations: imported, curated, packed to a training stage's length."""
