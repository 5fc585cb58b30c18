"""Nothing here is a test of ours: ``run.py`` starts PEFT's, in another folder."""

collect_ignore_glob = ["*.py"]
