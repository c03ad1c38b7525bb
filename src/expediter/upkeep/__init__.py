"""How do I look after it?"""
