"""From the names that a model has in memory to those that its files have.

    from_memory             each tensor in memory to its tensors in files
    families                what files of a class of transformers are called, and which rows each has
    accounted               whether the files have all of a model
    states                  a state by the names in files
    ties                    roles that engines fuse, so that they share a format and a scale

What transformers spells, it is asked for; what others spell, such as Megatron, is in the tables of `from_memory`.
"""
