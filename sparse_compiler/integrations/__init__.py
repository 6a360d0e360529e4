"""Helpers for other libraries; each is optional and imported on demand."""
