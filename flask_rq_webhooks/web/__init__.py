"""What people and API clients see: the only Flask views of the package.

:mod:`operations` has one function per action of an operator; :mod:`api` and the pages translate. Reads and
changes rows through ``storage``; sends nothing itself.
"""
