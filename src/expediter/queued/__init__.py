"""What if the broker has it first?"""
