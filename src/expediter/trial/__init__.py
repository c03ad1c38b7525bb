"""What one tries Expediter on: a payment gateway that misbehaves when it is told to."""
