"""Matrices of a group, each where it lies, in fp32."""
