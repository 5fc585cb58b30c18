"""Checking a checkpoint: is one pass right, how fast is it, and what do old checkpoints hold.

``moelora validate`` and ``moelora convert`` are thin over :func:`~moelora.validation.job.validate`
and :func:`~moelora.validation.convert.convert_checkpoint`.
"""
