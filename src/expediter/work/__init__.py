"""What happens to a stored order?"""
