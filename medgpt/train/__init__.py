"""The three stages of training: stages as data, one trainer, memory known before it starts."""
