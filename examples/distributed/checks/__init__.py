"""The checks that ``check_gpus.py`` runs on every process."""
