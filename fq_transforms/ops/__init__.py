"""Operations on one group of expert weights: the definition, the kernels that equal it, and their gradients."""
