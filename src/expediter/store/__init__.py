"""How is it written and read?"""
