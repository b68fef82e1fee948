"""Engines that train: each module is the only importer of its engine, and is imported by name."""
