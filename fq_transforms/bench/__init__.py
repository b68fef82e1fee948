"""`python -m fq_transforms.bench`: every operation against the floor of memory and against its peers, checked first."""
