"""Directories and bytes.

    directory               a folder as transformers has it, which appears whole or not at all; its JSON files
    shards                  safetensors: where each tensor lies, and new files, laid out before the first byte
    tables                  sizes and numbers of layers that can be read

Nothing here knows what a tensor stands for.
"""
