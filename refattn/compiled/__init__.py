"""The recurrence compiled by Numba (extra `numba`): `refattn.recurrence(…, compiled=True)` and its like come here.

Nothing is compiled, and Numba is not imported, before the first such call. What is compiled is kept on disk, and the next process loads it.
"""
