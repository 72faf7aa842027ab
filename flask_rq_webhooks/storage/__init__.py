"""What is remembered: the only SQL of the package.

Owns the tables, the own engine, encryption at rest, and every statement. Knows nothing of Flask
requests, Redis, RQ or HTTP.
"""
