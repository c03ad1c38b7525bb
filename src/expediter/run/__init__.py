"""How does it start and stop?"""
